"""Measures the drawing of a picture, beside the one that the plan counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import Tensor

from compiler.plan import Plan
from runtime.families.base import PICTURE, Family, TextEmbedding
from runtime.families.common import draw
from runtime.memory.gauge import Gauge, lying
from runtime.memory.phases import example_embedding, largest
from runtime.memory.pieces import drawing_words, given_to, tensors_in
from runtime.modules import blocks_of


@contextmanager
def drawing(
    gauge: Gauge,
    plan: Plan,
    family: Family,
    parts: Mapping[str, Any],
    told: Sequence[TextEmbedding],
    options: Mapping[str, Any],
    there: Mapping[str, Sequence[Tensor]],
) -> Iterator[None]:
    """Inside, a picture is drawn of `parts` with `options`, see `runtime.families.common.draw`.

    `there` is what training keeps on the device, by category. The embeddings `told` and the picture
    that a family refines belong to the host.
    """
    model, size = parts[plan.model.trained_component], (options["width"], options["height"])
    vae = lying(parts["vae"]) if gauge.wants("validate", size[0] * size[1]) else {}
    both = {name: [*there.get(name, ()), *vae.get(name, ())] for name in {**there, **vae}}
    on_host = [tensor for each in told for tensor in each.values()]
    on_host += [parts[PICTURE]] if PICTURE in parts else []
    on_host += tensors_in(vars(parts["scheduler"]))  # its tables
    block = blocks_of(model, family.card.blocks[:1])[0]
    with gauge.reading("validate", size[0] * size[1], both, on_host) as piece:
        with given_to(model) as given, given_to(block) as inside:
            yield
        piece.on = drawing_words(*size, told[0], given, inside)
    if gauge.readings.get("validate") is piece:
        most = largest(plan.validation.sizes)
        like = size if size in most else most[0]
        longest = example_embedding(plan.model, family, plan.text, plan.precision)
        apart = {**parts, "scheduler": deepcopy(parts["scheduler"])}
        wanted = {**options, "width": like[0], "height": like[1]}
        with given_to(model) as given, given_to(block, runs=False) as inside:
            draw(family, apart, longest, longest, **wanted)
        piece.planned = drawing_words(*like, longest, given, inside)
