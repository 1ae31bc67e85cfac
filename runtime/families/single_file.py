"""A component out of a file in its publisher's names: alone, or one of a whole model's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compiler.families.card import FamilyCard
from compiler.families.whole_file import MODEL
from runtime.errors import RunFailed

PROJECTION = "text_projection.weight"


def translated(
    card: FamilyCard,
    name: str,
    cls: Any,
    library: str,
    file: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> nn.Module:
    """The component `name` from `file`, by Diffusers' own readers of such files, on the host.

    Only its own tensors are read. Its configuration is `config`: nothing is looked up elsewhere.
    Raises RunFailed if Diffusers can't read it, or if the file lacks some of it.
    """
    try:
        tensors = own_tensors(card, name, file)
        if name == "transformer":
            tensors = _without_prefix(tensors)
        with TemporaryDirectory() as folder:  # it takes a configuration from a folder only
            Path(folder, name).mkdir()
            Path(folder, name, "config.json").write_text(json.dumps(config), encoding="utf-8")
            loaded = _read(cls, library, name, tensors, folder, dtype)
    except (
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        raise _unreadable(file, card, name, cls, str(error)) from error
    missing = [key for key, value in loaded.state_dict().items() if value.is_meta]
    if missing:
        why = f"it lacks {len(missing)} tensors, such as `{missing[0]}`"
        raise _unreadable(file, card, name, cls, why)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()  # off the file, whose tensors no kernel finds aligned
    return loaded


def _unreadable(file: Path, card: FamilyCard, name: str, cls: Any, why: str) -> RunFailed:
    """`file` may be all of the base, or the recipe's own for the trained component."""
    own = f", or a file in Diffusers' names: [model.{name}] file"
    return RunFailed(
        f"{file} can't be read as a {cls.__name__}: {why}",
        help="name a base that is a folder in the Diffusers layout"
        + own * (name == card.trained_component),
    )


def _read(
    cls: Any, library: str, name: str, tensors: dict[str, Tensor], folder: str, dtype: torch.dtype
) -> nn.Module:
    from diffusers.loaders.single_file_utils import (
        create_diffusers_clip_model_from_ldm,
        create_diffusers_t5_model_from_checkpoint,
    )
    from transformers import T5EncoderModel

    place: dict[str, Any] = {"config": folder, "subfolder": name, "torch_dtype": dtype}
    place["local_files_only"] = True
    if library == "diffusers":
        model: nn.Module = cls.from_single_file(tensors, **place)
        return model
    if issubclass(cls, T5EncoderModel):
        t5: nn.Module = create_diffusers_t5_model_from_checkpoint(cls, tensors, **place)
        t5.tie_weights()  # type: ignore[operator]
        return t5
    projection = _own_projection(tensors)
    clip: nn.Module = create_diffusers_clip_model_from_ldm(cls, tensors, **place)
    if projection is not None and PROJECTION in clip.state_dict():
        clip.get_parameter(PROJECTION).data = projection.to(dtype)
    return clip


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's tensors by the names that it has alone: not all of Diffusers' readers take
    the prefix of whole models off (Qwen-Image's), or find the tensors then (Lumina 2's)."""
    own = {k.removeprefix(MODEL): v for k, v in tensors.items() if k.startswith(MODEL)}
    return own or tensors


def _own_projection(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The first CLIP's projection, where a file holds one: Diffusers takes it for the identity,
    which is what published files leave out."""
    return next(
        (
            value
            for key, value in tensors.items()
            if key.endswith(f"clip_l.transformer.{PROJECTION}")
        ),
        None,
    )


def own_tensors(card: FamilyCard, name: str, file: Path) -> dict[str, Tensor]:
    """The tensors of `file` that are none of another component. Raises OSError, SafetensorError."""
    layouts = card.whole_file.parts if card.whole_file else {}
    strange = tuple(
        layout.prefix
        for part, each in layouts.items()
        for layout in each
        if part != name and layout.prefix
    )
    opener: Any = safe_open
    with opener(file, "pt") as opened:
        kept = [key for key in opened.keys() if not key.startswith(strange)]  # noqa: SIM118
        # Files may also hold components that no layout is known of.
        prefixes = [each.prefix for each in layouts.get(name, ()) if each.prefix]
        mine = [key for key in kept if key.startswith(tuple(prefixes))]
        return {key: opened.get_tensor(key) for key in mine or kept}


def stored_dtype(card: FamilyCard, name: str, file: Path) -> torch.dtype:
    """The number format that most of a component's tensors in `file` have; of eight bits, bfloat16,
    which holds all their numbers."""
    counts: dict[torch.dtype, int] = {}
    for tensor in own_tensors(card, name, file).values():
        if tensor.is_floating_point():
            dtype = torch.bfloat16 if tensor.itemsize == 1 else tensor.dtype
            counts[dtype] = counts.get(dtype, 0) + tensor.numel()
    with suppress(ValueError):
        return max(counts, key=lambda dtype: counts[dtype])
    return torch.float32
