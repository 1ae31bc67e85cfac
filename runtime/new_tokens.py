"""New words in a tokenizer, as Diffusers puts them there.

A word of several vectors is several tokens: `<x>`, `<x>_1`, `<x>_2`; a pipeline writes all of them
where a prompt says `<x>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compiler.adapters import EMBEDDINGS_FILE
from compiler.plan import Embeddings, NewToken, TextTraining
from compiler.words import FOLDER
from runtime.errors import RunFailed

__all__ = ["FOLDER", "ROWS", "add_tokens", "encoders_of", "file_of", "is_rows", "words_of"]

ROWS = "rows"  # what vectors of new tokens are called in training


def words_of(token: NewToken) -> list[str]:
    """The tokens that a new word is made of."""
    return [token.token, *(f"{token.token}_{n}" for n in range(1, token.vectors))]


def add_tokens(tokenizer: Any, tokens: Sequence[NewToken]) -> int:
    """Teach a tokenizer the new words; returns the first one's number. Raises RunFailed if it knows
    one of them already."""
    first = len(tokenizer)
    for token in tokens:
        words = words_of(token)
        if tokenizer.add_tokens(words) != len(words):
            raise RunFailed(
                f"the base's tokenizer knows `{token.token}` already",
                help="give the new token another name",
            )
    return first


def is_rows(name: str) -> bool:
    """Whether what is called so in training are vectors of new tokens."""
    return name.endswith(f".{ROWS}")


def encoders_of(text: TextTraining | None, embeddings: Embeddings | None) -> tuple[str, ...]:
    """The encoders that any of the two changes, in their own order."""
    named = {*(text.encoders if text else ()), *(embeddings.encoders if embeddings else ())}
    return tuple(sorted(named))


def file_of(facts: Embeddings, token: NewToken) -> str:
    """The name of a word's file."""
    if len(facts.tokens) == 1:
        return EMBEDDINGS_FILE
    return f"{token.token.strip('<>')}.safetensors"
