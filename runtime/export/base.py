"""The trained component's own tensors in the base, as its files hold them: never quantised."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from attrs import evolve

from compiler.families import FAMILIES
from compiler.plan import Model
from runtime import rng
from runtime.export.lazy import Tensors, held, in_files
from runtime.families import family_of
from runtime.families.common import (
    base_folder,
    component_class,
    component_of,
    config_of,
    empty_component,
)
from runtime.families.single_file import stored_dtype, translated

STEM = "diffusion_pytorch_model"


def base_tensors(model: Model, seed: int) -> Tensors:
    """Each tensor of the trained component by its name in Diffusers.

    Where the plan starts from fresh weights they are drawn again, from the run's `seed`. Files that
    Diffusers has to translate while loading are loaded by it, as float32. Raises OSError.
    """
    name, model = model.trained_component, _plain(model)
    if model.init == "pretrained":
        own = component_of(model, name).file
        files = [Path(own)] if own else weight_files(base_folder(model, [name]) / name)
        found = in_files(files)
        shell = empty_component(model, name, torch.float32, torch.device("meta")).state_dict()
        if {k: tuple(v.shape) for k, v in shell.items()} == {k: v.shape for k, v in found.items()}:
            return found
    start = rng.key(seed, "weights") % (1 << 63)
    family = family_of(model.family)
    loaded = family.load(model, name, torch.float32, torch.device("cpu"), seed=start)
    return held(loaded.state_dict())


def component_tensors(model: Model, name: str) -> Tensors:
    """The tensors of a component that is not trained, as its files hold them; from a file in its
    publisher's names as Diffusers translates them. Raises OSError."""
    cls, library = component_class(model, name)
    if (own := component_of(model, name).file) is not None:
        card, file = FAMILIES[model.family], Path(own)
        dtype, config = stored_dtype(card, name, file), config_of(model, name)
        return held(translated(card, name, cls, library, file, config, dtype).state_dict())
    stem = "model" if library == "transformers" else STEM
    found = in_files(weight_files(base_folder(model, [name]) / name, stem))
    if not found:
        raise OSError(f"the base holds no weights of its {name}")
    return found


def _plain(model: Model) -> Model:
    parts = tuple(evolve(part, quantize="none") for part in model.components)
    return evolve(model, components=parts)


def weight_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The safetensors files of a component's folder; [] where it has none."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / shard for shard in sorted(set(shards))]
    single = folder / f"{stem}.safetensors"
    return [single] if single.is_file() else []
