"""What names a cached encoding: everything that it depends on, and nothing else.

A key is SHA-256 over the canonical JSON of its parts, encoders by the hash of their weights,
configuration and vocabulary. Changing a crop, a model or a precision therefore can't find a stale
entry, and moving or renaming files finds the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import asdict, frozen

from compiler.data.geometry import Placement
from compiler.plan import Model, Plan, digest_of
from runtime.data.cache import Cache
from runtime.data.hashes import folder_hash
from runtime.families.base import Family
from runtime.families.common import base_folder

TEXT_VERSION = 1
"""Raise it when the same prompt and encoders would give other embeddings."""
LATENTS_VERSION = 1
"""Raise it when the same picture and encoder would give other latents (decoding included)."""


@frozen
class TextKeys:
    """Keys of prompts under one plan."""

    base: str

    def key(self, prompt: str, *, negative: bool = False) -> bytes:
        """The key of a prompt, encoded as the pipeline encodes prompts or negative prompts."""
        return _key([self.base, prompt, negative])


@frozen
class LatentKeys:
    """Keys of pictures under one plan."""

    base: str

    def key(self, content: bytes, placement: Placement) -> bytes:
        """The key of a picture; `content` is the SHA-256 of its file."""
        return _key([self.base, content.hex(), asdict(placement)])


def text_parts(plan: Plan) -> tuple[str, ...]:
    """The components that encode prompts: tokenizers and text encoders."""
    prefixes = ("tokenizer", "text_encoder")
    return tuple(c.name for c in plan.model.components if c.name.startswith(prefixes))


def text_keys(plan: Plan, family: Family, cache: Cache) -> TextKeys:
    """Keys for the plan's text encoders; hashes their files (remembered in the cache)."""
    names = text_parts(plan)
    return TextKeys(
        digest_of(
            {
                "version": TEXT_VERSION,
                "family": family.card.name,
                "encoders": _encoders(plan.model, names, cache),
                "max_length": plan.text.max_length,
                "instruction": list(plan.text.instruction),
                "stored": plan.precision.cache,
            }
        )
    )


def latent_keys(plan: Plan, family: Family, cache: Cache) -> LatentKeys:
    """Keys for the plan's VAE; hashes its files (remembered in the cache)."""
    return LatentKeys(
        digest_of(
            {
                "version": LATENTS_VERSION,
                "family": family.card.name,
                "encoders": _encoders(plan.model, ("vae",), cache),
                "stored": plan.precision.cache,
            }
        )
    )


def _encoders(model: Model, names: Sequence[str], cache: Cache) -> list[list[str]]:
    """Name, precision and content of each component."""
    folder = base_folder(model, names)
    dtypes = {component.name: component.dtype for component in model.components}
    return [[name, dtypes[name], folder_hash(cache, folder / name)] for name in names]


def _key(parts: list[Any]) -> bytes:
    return bytes.fromhex(digest_of(parts))
