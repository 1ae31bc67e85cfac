"""Vectors of new tokens in files, as Diffusers' `load_textual_inversion` and ComfyUI read them.

One file for each word. It is called `learned_embeds.safetensors` where there is one word, which is
the name that Diffusers looks for in a folder; else as the word without its brackets. The vectors of
one encoder stand under the word itself, those of two under what the family's card calls them
(`clip_l`, `clip_g`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compiler.families.card import FamilyCard
from compiler.plan import Embeddings
from compiler.words import bundled_key
from runtime.new_tokens import file_of, is_rows


def write(
    values: Mapping[str, Tensor],
    facts: Embeddings,
    card: FamilyCard,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the vectors among `values`, which have their names in training, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for token in facts.tokens:
        tensors = {}
        for encoder in facts.encoders:
            rows = values[_named(values, encoder)][start : start + token.vectors]
            kept = rows.to("cpu", dtype or rows.dtype).contiguous()
            tensors[card.embedding_keys[encoder] or token.token] = kept
        save_file(tensors, folder / file_of(facts, token), metadata={"format": "pt"})
        start += token.vectors


def read(
    facts: Embeddings, card: FamilyCard, folder: Path, names: Iterable[str]
) -> dict[str, Tensor]:
    """The vectors in `folder` by their names in training, which are among `names`. Raises OSError,
    and KeyError for files of other words."""
    files = {token: load_file(folder / file_of(facts, token)) for token in facts.tokens}
    every = dict.fromkeys(names)
    return {
        _named(every, encoder): torch.cat(
            [held[card.embedding_keys[encoder] or token.token] for token, held in files.items()]
        )
        for encoder in facts.encoders
    }


def bundled(values: Mapping[str, Tensor], facts: Embeddings, card: FamilyCard) -> dict[str, Tensor]:
    """The vectors under the keys that they have in a LoRA's own file, see `compiler.words`."""
    found: dict[str, Tensor] = {}
    for encoder in facts.encoders:
        rows, start = values[_named(values, encoder)], 0
        for token in facts.tokens:
            key = bundled_key(card.embedding_keys[encoder], token.token)
            found[key] = rows[start : start + token.vectors].cpu().contiguous()
            start += token.vectors
    return found


def _named(values: Mapping[str, object], encoder: str) -> str:
    """What the vectors of an encoder are called in training."""
    (name,) = (n for n in values if n.startswith(f"{encoder}.") and is_rows(n))
    return name
