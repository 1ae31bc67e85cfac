"""Full fine-tuning: every weight of the trained component."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compiler.plan import Model, Precision
from runtime.families.base import Family
from runtime.families.common import DTYPES, base_folder, copy_component
from runtime.methods import text_files
from runtime.methods.base import Built, check_names, masters, state


def prepare(model: nn.Module, precision: Precision) -> Built:
    """Make all of `model` trainable, given in `precision.trained` so that masters lose nothing."""
    model.requires_grad_(True)
    loaded = {name: p.detach() for name, p in model.named_parameters()}
    owned = masters(model.to(DTYPES[precision.compute]), loaded)
    count = sum(p.numel() for p in loaded.values())
    return Built(model=model, trainable=owned, parameters=count, adapted_modules=0)


def export(
    built: Built,
    model: Model,
    family: Family,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a complete pipeline in the Diffusers layout into `folder`: the base's, newly trained.

    `weights` replace the trained ones (an average of them, say); `dtype` is what the trained
    component is saved as, by default what it is trained in. Other components are copied.
    """
    values = state(built) if weights is None else weights
    check_names(built, values)
    names = [c.name for c in model.components if c.name != model.trained_component]
    source = base_folder(model, names)
    folder.mkdir(parents=True, exist_ok=True)
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    for name, entry in index.items():
        if not isinstance(entry, list) or name == model.trained_component:
            continue
        if not copy_component(model, name, source, folder):
            index[name] = [None, None]  # a part that the pipeline can do without
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")
    save_component(built.model, values, dtype, folder / model.trained_component)
    save_encoders(built, values, dtype, folder)


@torch.no_grad()
def save_encoders(
    built: Built,
    values: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    folder: Path,
    ending: str = "",
) -> None:
    """Save what of `values` are text encoders as components, each in a folder of its name."""
    for name, module in built.text.encoders.items() if built.text else ():
        own = text_files.of_encoder(values, name)
        kept = {k: v.to(dtype or v.dtype).contiguous() for k, v in own.items()}
        encoder: Any = module
        place = folder / (name + ending)
        for old in (*place.glob("*.safetensors*"), *place.glob("*.bin*")):
            old.unlink()  # the base's, which may be in several files
        encoder.save_pretrained(place, state_dict=kept)


@torch.no_grad()
def save_component(
    model: nn.Module, values: Mapping[str, Tensor], dtype: torch.dtype | None, folder: Path
) -> None:
    """Save `values` as a component of the class and configuration of `model`."""
    source: Any = model
    with torch.device("meta"):
        shell = type(source).from_config(source.config)
    tensors = {**dict(source.named_buffers()), **values}
    kept = {k: tensors[k].to(dtype or tensors[k].dtype).contiguous() for k in shell.state_dict()}
    shell.load_state_dict(kept, assign=True)
    shell.save_pretrained(folder)
