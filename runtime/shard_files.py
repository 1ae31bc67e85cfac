"""Reads what the ranks of a sharded run wrote, whole, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

SHARDS = "shards"
"""The folder in a checkpoint."""


def read_whole(folder: Path) -> dict[str, dict[str, Tensor]]:
    """All tensors below `folder` in host memory, by kind ("weights", "ema", "optimizer") and name.

    Raises OSError if a file is missing or damaged.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    reader = FileSystemReader(folder)
    stated: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    held = {key: torch.empty(of.size, dtype=of.properties.dtype) for key, of in stated.items()}
    read_into(held, reader)
    found: dict[str, dict[str, Tensor]] = {"weights": {}, "ema": {}, "optimizer": {}}
    for key, tensor in held.items():
        kind, _, name = key.partition(".")
        found[kind][name] = tensor
    return found


def read_into(held: dict[str, Any], reader: FileSystemReader) -> None:
    """Fill the tensors of `held` from files, in this process alone.

    Raises OSError if one is missing or damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        load(held, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # no Exception, and what is wrong stands in it
        raise OSError(str(next((found[0] for found in error.failures.values()), error))) from error


def joined(rest: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state of which `tensors`, by "NUMBER.KEY", were kept apart."""
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        rest["state"].setdefault(int(number), {})[key] = tensor
    return rest
