"""A LoRA from the difference of two models: `tuner export --extract BASE TUNED`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from attrs import frozen
from safetensors import SafetensorError
from torch import Tensor, nn

from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from runtime.errors import RunFailed
from runtime.export import lora_keys
from runtime.export.base import weight_files
from runtime.export.conventions import Format, refusal
from runtime.export.export import COMFYUI, KOHYA
from runtime.export.lazy import Tensors, held, in_files, write
from runtime.export.request import PRECISIONS, Refused
from runtime.export.size import Size
from runtime.export.svd import extracted
from runtime.families.common import DTYPES
from runtime.methods.lora import is_dense


@frozen(kw_only=True)
class Extracted:
    """What was written, and what a LoRA can't hold of the difference."""

    out: Path
    layers: int
    left: tuple[str, ...]  # tensors that differ and are in no LoRA: biases, norms, embeddings


def extract(
    base: Path, tuned: Path, size: Size, *, format: Format, precision: str, out: Path
) -> Extracted:
    """Write the LoRA of `size` that makes of `base` what is nearest to `tuned`.

    Both are folders of pipelines, or of their transformer or unet. Raises Refused for models that
    are not alike, or do not differ, and RunFailed if the place can't be written.
    """
    one, other = _opened(base), _opened(tuned)
    if one.config != other.config or one.tensors.keys() != other.tensors.keys():
        raise Refused(f"`{base}` and `{tuned}` are not of one shape", help="take models alike")
    if why := refusal(format, one.card.name, "lora"):
        raise Refused(why, help="use another `--format`")
    layers: dict[str, lora_keys.Layer] = {}
    left = []
    for name in sorted(one.tensors):
        difference = other.tensors[name].read().float() - one.tensors[name].read().float()
        if not difference.any():
            continue
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in one.dense:
            layers[module] = extracted(difference, size)
        else:
            left.append(name)
    if not layers:
        raise Refused(f"`{tuned}` has no layer that differs from `{base}`", help="name two models")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(layers, one, format, PRECISIONS.get(precision), out)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"`{out}` can't be written: {error}") from error
    return Extracted(out=out, layers=len(layers), left=tuple(left))


@frozen(kw_only=True)
class _Model:
    card: FamilyCard
    config: Mapping[str, Any]
    tensors: Tensors
    dense: frozenset[str]  # names of its linear layers and convolutions


def _opened(folder: Path) -> _Model:
    """Raises Refused if `folder` holds no model that a family here trains."""
    for card in FAMILIES.values():
        for place in (folder / card.trained_component, folder):
            found = _config(place)
            if found.get("_class_name") == card.components[card.trained_component]:
                if not _is_of(card, folder, place):
                    continue
                tensors = in_files(weight_files(place))
                if not tensors:
                    raise Refused(f"`{place}` holds no weights", help="name a Diffusers folder")
                plain = {k: v for k, v in found.items() if not k.startswith("_")}
                return _Model(card=card, config=plain, tensors=tensors, dense=_dense(found))
    known = ", ".join(FAMILIES)
    raise Refused(
        f"`{folder}` is no model in the Diffusers layout of a family known here",
        help=f"name the folder of a pipeline; families: {known}",
    )


def _is_of(card: FamilyCard, folder: Path, place: Path) -> bool:
    """Several families share a class of models: the pipeline tells, where there is one."""
    index = {} if place == folder else _json(folder / "model_index.json")
    return bool(index.get("_class_name", card.pipeline) == card.pipeline)


def _config(folder: Path) -> dict[str, Any]:
    return _json(folder / "config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _dense(config: Mapping[str, Any]) -> frozenset[str]:
    with torch.device("meta"):
        shell: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    return frozenset(name for name, module in shell.named_modules() if is_dense(module))


def _write(
    layers: Mapping[str, lora_keys.Layer], model: _Model, format: Format, dtype: Any, out: Path
) -> None:
    component, metadata = model.card.trained_component, {}
    tensors: dict[str, Tensor]
    foreign = {"kohya": KOHYA, "comfyui": COMFYUI}.get(format, {})
    if model.card.name in foreign:
        try:
            tensors = foreign[model.card.name](layers, model.config)
        except KeyError as error:
            raise RunFailed(
                f"the {format} layout has no place for {error}", help="use `--format diffusers`"
            ) from error
    elif format == "comfyui":
        tensors = lora_keys.folded(layers, component)
    else:
        tensors = lora_keys.diffusers(layers, component)
        metadata = lora_keys.settings(layers, component)
    wanted = DTYPES[dtype] if dtype else None
    found = held({k: v.contiguous() for k, v in tensors.items()})
    kept = {k: v if k.endswith(".alpha") else v.to(wanted) for k, v in found.items()}
    write(out, kept, metadata)
