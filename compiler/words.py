"""New words of text encoders in files: where their vectors lie, and what they are called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compiler.adapters import EMBEDDINGS_FILE

FOLDER = "embeddings"
"""Where their files lie in a result that holds an adapter too."""
BUNDLE = "bundle_emb"
"""How keys of words begin that lie in a LoRA's own file, as A1111 and its kin read them
(extensions-builtin/Lora/networks.py)."""
ALONE = "emb_params"  # what A1111 calls the vectors of one encoder


def bundled_key(key: str, token: str) -> str:
    """The key of a word's vectors in a LoRA's file; `key` is what the family's card calls those of
    an encoder. A name ends at the first dot there."""
    name = token.strip("<>").replace(".", "_")
    return f"{BUNDLE}.{name}.{key or ALONE}"


def vector_keys(key: str, token: str) -> tuple[str, ...]:
    """The keys that the vectors of an encoder may have in a file, ours first."""
    return (*((key,) if key else (token, ALONE)), bundled_key(key, token))


def beside(adapter: Path, token: str, alone: bool) -> Iterator[Path]:
    """Files that may hold a word which was learned with the adapter in the file `adapter`: that
    file, those of a run's result, those of an export. `alone`: it is the recipe's only word."""
    yield adapter
    for folder in (adapter.parent / FOLDER, adapter.parent / f"{adapter.stem}-{FOLDER}"):
        yield folder / f"{token.strip('<>')}.safetensors"
        if alone:
            yield folder / EMBEDDINGS_FILE
