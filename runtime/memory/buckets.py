"""Which of a run's batches, and which parts of them, may need the most memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import inf

from attrs import frozen

from compiler.families import FAMILIES
from compiler.memory import Candidate
from compiler.plan import Model, Plan, Text

Shape = tuple[int, int, int]  # width, height (pixels), batch size

MULTIPLIED = "native-math"  # the attention that makes the whole matrix of scores
NEAR = 0.8  # below this share of another bucket's bounds one is never the worst


@frozen(kw_only=True)
class Bounds:
    """What a sample's share of a step's memory lies between.

    A step's tensors are made for each place of the picture and for each token of the prompt. What
    a token costs differs: as much as a place where both go through the same layers (MMDiT), next to
    nothing where it only gives keys and values (a UNet). So one bucket needs less than another if
    it does with tokens that cost nothing, and with tokens that cost as much as places.
    """

    text: float = 0.0  # a prompt's tokens, in pixels of as many places; inf: they may cost more
    micro_batch: int = 0  # samples that are run together; 0: whole batches
    squared: bool = False  # attention makes a matrix of all places by all places

    def of(self, shape: Shape) -> list[float]:
        """A bucket's bounds. Where one bucket's are all less than another's, so is its need."""
        pixels, batch = shape[0] * shape[1], shape[2]
        run = min(self.micro_batch or batch, batch)
        most = 1 if self.text == inf else pixels + self.text
        found = [samples * each for samples in (run, batch) for each in (pixels, most)]
        return [*found, run * max(pixels, most) ** 2] if self.squared else found


def worst(shapes: Iterable[Shape], bounds: Bounds | None = None) -> list[Shape]:
    """Those of the buckets (width, height, batch size) that may need the most memory.

    More pixels or a larger batch never need less, so what is no more than another in both is out;
    so is what is clearly less by its `bounds`, which tell of no prompt if none are given.
    """
    bounds = bounds or Bounds()
    sizes = {(width * height, batch): (width, height, batch) for width, height, batch in shapes}
    kept = [
        shape
        for (pixels, batch), shape in sorted(sizes.items(), reverse=True)
        if not any(p >= pixels and b >= batch and (p, b) != (pixels, batch) for p, b in sizes)
    ]
    known = {shape: bounds.of(shape) for shape in kept}
    return [shape for shape in kept if not any(_less(known[shape], known[o]) for o in kept)]


def worst_of(candidate: Candidate, *, evaluated: bool = False) -> list[Shape]:
    """`worst` of what a candidate trains on, or of its held-out pictures."""
    words = candidate.text_training is not None or candidate.embeddings is not None
    bounds = Bounds(
        text=inf if words else text_pixels(candidate.model, candidate.text),
        micro_batch=0 if evaluated else candidate.micro_batch,
        squared=candidate.attention == MULTIPLIED,
    )
    return worst(candidate.evaluated if evaluated else candidate.shapes, bounds)


def worst_in(plan: Plan, shapes: Iterable[Shape], *, evaluated: bool = False) -> list[Shape]:
    """`worst` of a plan's `shapes`, on which it trains or which it evaluates."""
    words = plan.text_training is not None or plan.embeddings is not None
    bounds = Bounds(
        text=inf if words else text_pixels(plan.model, plan.text),
        micro_batch=0 if evaluated else plan.steps.micro_batch,
        squared=plan.speed.attention == MULTIPLIED,
    )
    return worst(shapes, bounds)


def trained_shapes(plan: Plan) -> list[Shape]:
    """The batches that may need the most memory of those on which a plan trains."""
    return worst_in(plan, [(b.width, b.height, min(b.batch_size, b.samples)) for b in plan.buckets])


def evaluated_shapes(plan: Plan) -> list[Shape]:
    """The same of its held-out pictures; none where it evaluates nothing."""
    groups = plan.evaluation.groups if plan.evaluation is not None else ()
    shapes = [(g.width, g.height, min(g.batch_size, g.images)) for g in groups]
    return worst_in(plan, shapes, evaluated=True)


def text_pixels(model: Model, text: Text) -> float:
    """The pixels of as many places as a prompt of full length has tokens."""
    card = FAMILIES[model.family]
    configs = {name: json.loads(config) for name, config in model.configs.items()}
    shapes = card.embedding_shapes(configs, text.max_length).values()
    tokens = sum(shape[0] for shape in shapes if len(shape) > 1)
    edge = card.vae_factor(configs["vae"]) * card.patch(configs[model.trained_component])
    return float(tokens * edge**2)


def part_sizes(batch: int, micro_batch: int) -> list[int]:
    """Samples of the parts of one batch, as `Batch.parts` cuts it."""
    size = micro_batch or batch
    return [min(size, batch - start) for start in range(0, batch, size)]


def parts_run(sizes: Sequence[int]) -> list[int]:
    """Of a window's parts with so many samples, those that tell its peak: the first, while no
    gradient is there yet, and the largest that finds some, the last one of them."""
    later = range(1, len(sizes))
    return [0, max(later, key=lambda part: (sizes[part], part))] if later else [0]


def runs_of(candidate: Candidate, shape: Shape) -> int:
    """How many parts of a window of the bucket `shape` are run."""
    return len(parts_run(part_sizes(shape[2], candidate.micro_batch) * candidate.accumulate))


def of_batch(candidate: Candidate, shape: Shape, spent: int) -> int:
    """Operations of one batch of the bucket `shape`, of those `spent` in the parts that are run:
    as many for each sample."""
    sizes = part_sizes(shape[2], candidate.micro_batch) * candidate.accumulate
    return spent * shape[2] // sum(sizes[part] for part in parts_run(sizes))


def _less(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(mine < NEAR * theirs for mine, theirs in zip(one, other, strict=True))
