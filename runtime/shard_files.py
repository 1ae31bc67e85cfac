"""Reads what the ranks of a sharded run wrote, whole, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARDS = "shards"
"""The folder in a checkpoint."""


def read_whole(folder: Path) -> dict[str, dict[str, Tensor]]:
    """All tensors below `folder` in host memory, by kind ("weights", "ema", "optimizer") and name.

    Raises OSError if a file is missing.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    stated: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    held = {key: torch.empty(of.size, dtype=of.properties.dtype) for key, of in stated.items()}
    load(held, storage_reader=reader, no_dist=True)
    found: dict[str, dict[str, Tensor]] = {"weights": {}, "ema": {}, "optimizer": {}}
    for key, tensor in held.items():
        kind, _, name = key.partition(".")
        found[kind][name] = tensor
    return found


def joined(rest: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state of which `tensors`, by "NUMBER.KEY", were kept apart."""
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        rest["state"].setdefault(int(number), {})[key] = tensor
    return rest
