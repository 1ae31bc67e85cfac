"""What names a cached encoding: everything that it depends on, and nothing else.

A key is SHA-256 over the canonical JSON of its parts, encoders by the hash of their weights,
configuration and vocabulary. Changing a crop, a model or a precision therefore can't find a stale
entry, and moving or renaming files finds the right one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import asdict, frozen

from compiler.data.geometry import Placement
from compiler.data.manifest import Item, Manifest
from compiler.plan import Model, Plan, canonical, digest_of
from runtime.data.hashes import file_hashes, folder_hash, known_folder_hash, known_hashes
from runtime.data.store import Store

if TYPE_CHECKING:  # both import torch, and a plan that asks what is cached must not
    from runtime.data.cache import Cache
    from runtime.families.base import Family

TEXT_VERSION = 1
"""Raise it when the same prompt and encoders would give other embeddings."""
LATENTS_VERSION = 1
"""Raise it when the same picture and encoder would give other latents (decoding included)."""
MASK_VERSION = 1
"""Raise it when the same mask would give other shares."""
ALPHA = "alpha"
"""Stands for a mask in keys: the picture's own transparency, whose content is the picture's."""
WHOLE = "whole"
"""Stands for the mask of a picture that needs none."""
PLACEMENTS = 256
"""Of which it is remembered what they add to a key: many pictures share one."""
FOCUS_VERSION = 1
"""Raise it when faces or what is salient would be found elsewhere in the same picture."""


@frozen
class TextKeys:
    """Keys of prompts under one plan."""

    base: str

    def key(self, prompt: str, *, negative: bool = False) -> bytes:
        """The key of a prompt, encoded as the pipeline encodes prompts or negative prompts."""
        return _key(self.base, json.dumps(prompt), "true" if negative else "false")


@frozen
class LatentKeys:
    """Keys of pictures under one plan."""

    base: str

    def key(self, content: bytes, placement: Placement, mask: str = "") -> bytes:
        """The key of a picture; `content` is the SHA-256 of its file, and `mask` stands for its
        mask (see `mask_names`)."""
        masked = [canonical({"mask": mask, "mask_version": MASK_VERSION})] if mask else []
        return _key(self.base, f'"{content.hex()}"', _moves(placement, FOCUS_VERSION), *masked)


@lru_cache(maxsize=PLACEMENTS)
def _moves(placement: Placement, version: int) -> str:
    """What is done to the picture, as canonical JSON; what is not done is left out."""
    parts = asdict(placement)
    if not placement.mirrored:
        del parts["mirrored"]
    if placement.focus:
        parts["focus_version"] = version
    else:
        del parts["focus"]
    return canonical(parts)


def mask_path(plan: Plan, manifest: Manifest, row: int) -> str:
    """The file with the mask of `row`; "" where there is none."""
    rules, key = plan.sources[manifest.source(row)].mask, manifest.mask(row)
    return os.path.join(rules.folder, key) if rules is not None and key else ""


def mask_kind(plan: Plan, source: int) -> str:
    """What stands for the mask of a picture of `source` that has no file of its own."""
    rules = plan.sources[source].mask
    return "" if rules is None else ALPHA if rules.kind == "alpha" else WHOLE


def mask_names(plan: Plan, manifest: Manifest, cache: Cache, rows: Sequence[int]) -> list[str]:
    """What stands for the mask of each of `rows` in its key: "", ALPHA, WHOLE, or the hash of its
    file.

    Raises FileGone.
    """
    files = _mask_files(plan, manifest, rows)
    found = iter(file_hashes(cache, [path for path in files if path], plan.workers))
    return [
        next(found).hex() if path else mask_kind(plan, manifest.source(row))
        for row, path in zip(rows, files, strict=True)
    ]


def known_mask_names(plan: Plan, manifest: Manifest, store: Store, count: int) -> list[str | None]:
    """As `mask_names` of the first `count` rows, None where a hash is not remembered."""
    files = _mask_files(plan, manifest, range(count))
    found = iter(known_hashes(store, [Item(file=path) for path in files if path]))
    return [
        (None if (digest := next(found)) is None else digest.hex())
        if path
        else mask_kind(plan, manifest.source(row))
        for row, path in enumerate(files)
    ]


def _mask_files(plan: Plan, manifest: Manifest, rows: Sequence[int]) -> list[str]:
    if not any(source.mask for source in plan.sources):
        return [""] * len(rows)
    return [mask_path(plan, manifest, row) for row in rows]


def text_parts(plan: Plan) -> tuple[str, ...]:
    """The components that encode prompts: tokenizers and text encoders."""
    prefixes = ("tokenizer", "text_encoder")
    return tuple(c.name for c in plan.model.components if c.name.startswith(prefixes))


def text_keys(plan: Plan, family: Family, cache: Cache) -> TextKeys:
    """Keys for the plan's text encoders; hashes their files (remembered in the cache)."""
    return _text_keys(plan, family.card.name, _encoders(plan.model, text_parts(plan), cache))


def latent_keys(plan: Plan, family: Family, cache: Cache) -> LatentKeys:
    """Keys for the plan's VAE; hashes its files (remembered in the cache)."""
    return _latent_keys(plan, family.card.name, _encoders(plan.model, ("vae",), cache))


def known_text_keys(plan: Plan, folder: Path, store: Store) -> TextKeys | None:
    """As `text_keys`, if the hashes of the base in `folder` are remembered; reads no file."""
    found = _known_encoders(plan.model, text_parts(plan), folder, store)
    return None if found is None else _text_keys(plan, plan.model.family, found)


def known_latent_keys(plan: Plan, folder: Path, store: Store) -> LatentKeys | None:
    """As `latent_keys`, if the hashes of the base in `folder` are remembered; reads no file."""
    found = _known_encoders(plan.model, ("vae",), folder, store)
    return None if found is None else _latent_keys(plan, plan.model.family, found)


def _text_keys(plan: Plan, family: str, encoders: list[list[str]]) -> TextKeys:
    return TextKeys(
        digest_of(
            {
                "version": TEXT_VERSION,
                "family": family,
                "encoders": encoders,
                "max_length": plan.text.max_length,
                "instruction": list(plan.text.instruction),
                "stored": plan.precision.cache,
                **({"zeros_for_empty": True} if plan.text.zeros_for_empty else {}),
            }
        )
    )


def _latent_keys(plan: Plan, family: str, encoders: list[list[str]]) -> LatentKeys:
    return LatentKeys(
        digest_of(
            {
                "version": LATENTS_VERSION,
                "family": family,
                "encoders": encoders,
                "stored": plan.precision.cache,
                **({"together": plan.vae_batch} if plan.vae_batch > 1 else {}),
            }
        )
    )


def _formats(model: Model) -> dict[str, str]:
    """How each component is held and works: "bfloat16", "bfloat16 int8", "float32 tiled"."""
    return {
        part.name: " ".join(
            [
                part.dtype,
                *([part.quantize] if part.quantize != "none" else []),
                *(["tiled"] if part.tiling else []),
            ]
        )
        for part in model.components
    }


def _known_encoders(
    model: Model, names: Sequence[str], folder: Path, store: Store
) -> list[list[str]] | None:
    formats = _formats(model)
    found: list[list[str]] = []
    for name in names:
        own = _own_file(model, name)
        if own:
            (content,) = known_hashes(store, [Item(file=own)])
            digest = None if content is None else _of_file(model, name, content)
        else:
            digest = known_folder_hash(store, folder / name)
        if digest is None:
            return None
        found.append([name, formats[name], digest])
    return found


def _encoders(model: Model, names: Sequence[str], cache: Cache) -> list[list[str]]:
    """Name, number format and content of each component."""
    from runtime.families.common import base_folder

    folder = base_folder(model, names)
    formats = _formats(model)
    found = []
    for name in names:
        own = _own_file(model, name)
        digest = (
            _of_file(model, name, file_hashes(cache, [own])[0])
            if own
            else folder_hash(cache, folder / name)
        )
        found.append([name, formats[name], digest])
    return found


def _own_file(model: Model, name: str) -> str:
    return next(part.file or "" for part in model.components if part.name == name)


def _of_file(model: Model, name: str, content: bytes) -> str:
    """Stands for a component that is read from a file of this content."""
    return digest_of([content.hex(), model.configs[name]])


def _key(base: str, *parts: str) -> bytes:
    """Of a list: a text, and parts that are canonical JSON already. There may be millions of keys,
    and most of what they are made of is the same in all."""
    return hashlib.sha256(f'["{base}",{",".join(parts)}]'.encode()).digest()
