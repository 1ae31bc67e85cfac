"""A model whose tensors can be read: a folder in the Diffusers layout, or one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from safetensors import SafetensorError
from torch import nn

from compiler.families import FAMILIES
from compiler.families.card import Configs, FamilyCard
from compiler.families.whole_file import Shapes, held_in
from compiler.safetensors import header_of
from runtime.errors import RunFailed
from runtime.export.base import STEM, weight_files
from runtime.export.lazy import Tensors, held, in_files
from runtime.export.request import Refused
from runtime.families.common import class_called
from runtime.families.single_file import stored_dtype, translated
from runtime.methods.lora import is_dense


@frozen(kw_only=True)
class Opened:
    """The trained component of a model, and those of its text encoders that are there."""

    card: FamilyCard
    configs: Configs  # of these components
    tensors: Mapping[str, Tensors]  # by component, each by its names in Diffusers
    files: Mapping[str, tuple[Path, ...]]  # by component

    @property
    def config(self) -> Mapping[str, Any]:
        """The trained component's, without what only says where it comes from."""
        own = self.configs[self.card.trained_component]
        return {key: value for key, value in own.items() if not key.startswith("_")}

    def dense(self) -> frozenset[str]:
        """Names of the trained component's linear layers and convolutions."""
        own = self.configs[self.card.trained_component]
        with torch.device("meta"):
            shell: nn.Module = _class(self.card, self.card.trained_component).from_config(own)
        return frozenset(name for name, module in shell.named_modules() if is_dense(module))


def opened(base: Path, tuned: Path) -> tuple[Opened, Opened]:
    """Two models to be compared. A file has no configurations: it is taken for one of the other
    model's sizes, or else of a published one's. Raises Refused."""
    if base.is_file() and not tuned.is_file():
        other = _folder(tuned)
        return _file(base, other), other
    one = _file(base, None) if base.is_file() else _folder(base)
    return one, _file(tuned, one) if tuned.is_file() else _folder(tuned)


def _folder(folder: Path) -> Opened:
    """Raises Refused if `folder` holds no model that a family here trains."""
    for card in FAMILIES.values():
        for place in (folder / card.trained_component, folder):
            config = _json(place / "config.json")
            if _is_of(card, config, {} if place == folder else _json(folder / "model_index.json")):
                return _parts(card, folder, place, config)
    raise Refused(
        f"`{folder}` is no model in the Diffusers layout of a family known here",
        help=f"name the folder of a pipeline, or one file; families: {', '.join(FAMILIES)}",
    )


def _is_of(card: FamilyCard, config: Mapping[str, Any], index: Mapping[str, Any]) -> bool:
    """Several families share a class of models: the pipeline tells, or else the configuration."""
    if config.get("_class_name") != card.components[card.trained_component]:
        return False
    if pipeline := index.get("_class_name"):
        return bool(pipeline == card.pipeline)
    return card.is_of(config)


def _parts(card: FamilyCard, folder: Path, place: Path, config: Mapping[str, Any]) -> Opened:
    own: str = card.trained_component
    configs, files = {own: config}, {own: tuple(weight_files(place))}
    if not files[own]:
        raise Refused(f"`{place}` holds no weights", help="name a Diffusers folder")
    for name in card.text_encoders if place != folder else ():
        found = tuple(weight_files(folder / name, "model") or weight_files(folder / name, STEM))
        if found:
            files[name], configs[name] = found, _json(folder / name / "config.json")
    tensors = {name: in_files(paths) for name, paths in files.items()}
    return Opened(card=card, configs=configs, tensors=tensors, files=files)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file(path: Path, other: Opened | None) -> Opened:
    """Raises Refused if `path` holds no whole model in its publisher's names, nor the trained
    component of a model like `other` in Diffusers' names."""
    header = header_of(path)
    if header is None:
        raise Refused(f"`{path}` is no safetensors file", help="name a whole model")
    if other is not None:
        own: str = other.card.trained_component
        if header.shapes == {name: t.shape for name, t in other.tensors[own].items()}:
            return Opened(
                card=other.card,
                configs={own: other.configs[own]},
                tensors={own: in_files([path])},
                files={own: (path,)},
            )
        if names := _names(other.card, other.configs, header.shapes):
            return _translated(path, other.card, other.configs, names)
    for card in FAMILIES.values():
        for known in card.known:
            if names := _names(card, known.configs, header.shapes):
                return _translated(path, card, known.configs, names)
    raise Refused(
        f"`{path}` is no whole model in one file that is known here",
        help="name a folder in the Diffusers layout, as `save_pretrained` of the pipeline's "
        "`from_single_file` writes it",
    )


def _names(card: FamilyCard, configs: Configs, shapes: Shapes) -> tuple[str, ...]:
    """The components of these sizes that a file holds; () if the trained one is not there."""
    found = held_in(card.whole_file, configs, shapes) if card.whole_file else ()
    return found if card.trained_component in found else ()


def _translated(path: Path, card: FamilyCard, configs: Configs, names: Sequence[str]) -> Opened:
    tensors = {}
    for name in (card.trained_component, *card.text_encoders):
        if name not in names:
            continue
        cls, library = class_called(card.components[name], card)
        try:
            dtype = stored_dtype(card, name, path)
            model = translated(card, name, cls, library, path, configs[name], dtype)
        except (OSError, SafetensorError, RunFailed) as error:
            raise Refused(str(error), help="name a folder in the Diffusers layout") from error
        tensors[name] = held(model.state_dict())
    return Opened(
        card=card,
        configs={name: configs[name] for name in tensors},
        tensors=tensors,
        files=dict.fromkeys(tensors, (path,)),
    )


def _class(card: FamilyCard, name: str) -> Any:
    return class_called(card.components[name], card)[0]
