"""A LoRA from the difference of two models: `tuner export BASE --extract TUNED`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from attrs import frozen
from safetensors import SafetensorError
from torch import Tensor

from compiler.adapters import CLIP_TARGETS
from compiler.plan import Dtype
from runtime.errors import RunFailed
from runtime.export import encoders, lora_keys
from runtime.export.conventions import Format, refusal
from runtime.export.export import COMFYUI, KOHYA, has_place, write_peft
from runtime.export.lazy import Lazy, Tensors, held, write
from runtime.export.lora_keys import Layer
from runtime.export.opened import Opened, opened
from runtime.export.request import PRECISIONS, Refused
from runtime.export.size import Size
from runtime.export.svd import extracted
from runtime.families.common import DTYPES
from runtime.methods.text_files import inner

IN_ENCODERS = re.compile("|".join(CLIP_TARGETS["all-linear"]))
"""Layers of a CLIP that readers of LoRA files know."""
NUMBERS = "position_ids"  # of a CLIP: counted up, and only in files of older versions


@frozen(kw_only=True)
class Extracted:
    """What was written, and what a LoRA can't hold of the difference."""

    out: Path
    layers: int
    left: tuple[str, ...]
    """Tensors that differ and are in no LoRA: biases, norms, embeddings; and text encoders that
    have none at all."""


def extract(
    base: Path, tuned: Path, size: Size, *, format: Format, precision: str, out: Path
) -> Extracted:
    """Write the LoRA of `size` that makes of `base` what is nearest to `tuned`.

    Both are folders of pipelines, or of their transformer or unet, or whole models in one file.
    Text encoders are compared where both have them. Raises Refused for models that are not alike,
    or do not differ, and RunFailed if the place can't be written.
    """
    one, other = opened(base, tuned)
    component = one.card.trained_component
    alike = one.card is other.card and one.config == other.config
    if not alike or one.tensors[component].keys() != other.tensors[component].keys():
        raise Refused(f"`{base}` and `{tuned}` are not of one shape", help="take models alike")
    if why := refusal(format, one.card.name, "lora"):
        raise Refused(why, help="use another `--format`")
    dense = frozenset(m for m in one.dense() if has_place(format, one.card.name, m, one.config))
    layers, left = _difference(one.tensors[component], other.tensors[component], dense, size)
    text: dict[str, Layer] = {}
    for name in one.card.text_encoders:
        if name not in one.tensors or name not in other.tensors:
            continue
        # peft's folder is of one model.
        whole = name not in one.card.trainable_encoders or format == "peft"
        theirs, rest = _of_encoder(one, other, name, size, whole=whole)
        text |= {f"{name}.{module}": layer for module, layer in theirs.items()}
        left += rest
    if not layers and not text:
        if left:
            raise Refused(
                f"nothing in which `{tuned}` differs from `{base}` has a place in a LoRA with "
                f"{format} keys, such as `{left[0]}`",
                help="use `--format diffusers`" if format != "diffusers" else "",
            )
        raise Refused(f"`{tuned}` has no layer that differs from `{base}`", help="name two models")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(layers, text, one, format, PRECISIONS.get(precision), out)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"`{out}` can't be written: {error}") from error
    return Extracted(out=out, layers=len(layers) + len(text), left=tuple(left))


def _difference(
    one: Tensors, other: Tensors, dense: frozenset[str], size: Size
) -> tuple[dict[str, Layer], list[str]]:
    """The layers of a LoRA, and what else differs. `dense` are the modules that can have one."""
    layers: dict[str, Layer] = {}
    left = []
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other or one[name].shape != other[name].shape:
            left.append(name)
            continue
        difference = other[name].read().float() - one[name].read().float()
        if not difference.any():
            continue
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in dense:
            layers[module] = extracted(difference, size)
        else:
            left.append(name)
    return layers, left


def _of_encoder(
    one: Opened, other: Opened, name: str, size: Size, *, whole: bool
) -> tuple[dict[str, Layer], list[str]]:
    """The same of a text encoder; if only a `whole` one can be, the encoder itself if it
    differs."""
    if {p.resolve() for p in one.files[name]} == {p.resolve() for p in other.files[name]}:
        return {}, []
    first, second = (_plain(each.tensors[name]) for each in (one, other))
    if whole:
        return {}, [] if _equal(first, second) else [name]
    modules = {key.removesuffix(".weight") for key in first if key.endswith(".weight")}
    known = frozenset(module for module in modules if IN_ENCODERS.fullmatch(module))
    layers, left = _difference(first, second, known, size)
    return layers, [f"{name}.{key}" for key in left]


def _plain(tensors: Tensors) -> Tensors:
    """A text encoder's, by names that do not depend on the version of transformers."""
    return {k: lazy for k, lazy in inner(tensors).items() if not k.endswith(NUMBERS)}


def _equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)


def _same(one: Lazy, other: Lazy) -> bool:
    return one.shape == other.shape and torch.equal(one.read().float(), other.read().float())


def _write(
    layers: Mapping[str, Layer],
    text: Mapping[str, Layer],
    model: Opened,
    format: Format,
    dtype: Dtype | None,
    out: Path,
) -> None:
    wanted = DTYPES[dtype] if dtype else None
    if format == "peft":
        named = held({k: v.contiguous() for k, v in lora_keys.bare(layers).items()})
        kept = {name: lazy.to(wanted) for name, lazy in named.items()}
        write_peft(out, kept, lora_keys.of_peft(layers), {})
        return
    card, metadata = model.card, {}
    component, trained = card.trained_component, card.trainable_encoders
    tensors: dict[str, Tensor]
    foreign = {"kohya": KOHYA, "comfyui": COMFYUI}.get(format, {})
    if card.name in foreign:
        tensors = foreign[card.name](layers, model.config)
        tensors |= encoders.kohya(card.name, text, trained)
    elif format == "comfyui":
        tensors = lora_keys.folded(layers, component)
        tensors |= encoders.diffusers(text, trained, folded=True)[0]
    else:
        more, told = encoders.diffusers(text, trained, folded=False)
        tensors = lora_keys.diffusers(layers, component) | more
        own = [lora_keys.settings(layers, component)] if layers else []
        metadata = encoders.joined([*own, *told])
    found = held({k: v.contiguous() for k, v in tensors.items()})
    kept = {k: v if k.endswith(".alpha") else v.to(wanted) for k, v in found.items()}
    write(out, kept, metadata)
