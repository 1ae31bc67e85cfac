"""Checkpoints of a sharded run: each rank writes its own part, complete or absent as a whole.

    checkpoints/step-000400/
        shards/         weights, average and optimizer state (torch.distributed.checkpoint)
        optimizer.pt    what of the optimizer's state is no row of a weight
        state.json      as in every checkpoint, see `runtime.checkpoints`

Any number of ranks can go on from one, and so can a run that is not sharded. Names in `shards` are
"weights.NAME", "ema.NAME" and "optimizer.NUMBER.KEY".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from runtime import files
from runtime.checkpoints import (
    Snapshot,
    check_finite,
    is_complete,
    latest,
    load,
    read_state,
    reading,
    write_state,
)
from runtime.ema import Ema
from runtime.errors import RunFailed, first_line
from runtime.host_copy import HostCopy
from runtime.optimizers import load_state
from runtime.ranks import REDUCING, Ranks, RanksLost, is_disconnected, peers
from runtime.saved import folder_of
from runtime.shard_files import SHARDS, joined, read_into
from runtime.sharded import Shards


class Channel:
    """What the ranks write checkpoints through while they train: connections of their own, so that
    neither waits for the other. All ranks make it together."""

    def __init__(self) -> None:
        with peers():
            self.group = dist.new_group(backend="gloo", timeout=REDUCING)

    def meet(self) -> None:
        """Wait until all ranks are here. Raises RanksLost."""
        with peers():
            dist.barrier(self.group)


def taken(
    checkpoints: Path,
    head: Snapshot,
    shards: Shards,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    ranks: Ranks,
    room: HostCopy,
    channel: Channel,
) -> Callable[[], Path]:
    """Copy this rank's part of a checkpoint to `room`. What is returned writes it, all ranks
    together, in a thread of each, and returns its folder. `head` says what `state.json` is to hold.

    Writing raises RunFailed if it can't be done; older checkpoints are untouched then.
    """
    rows, rest = room.take(_parts(shards, optimizer, ema))
    pieces = list(shards.pieces.values())
    names = {name: number for number, name in enumerate(shards.pieces)}
    tensors = {}
    for key, tensor in rows.items():
        kind, _, name = key.partition(".")
        number = int(name.partition(".")[0]) if kind == "optimizer" else names[name]
        tensors[key] = pieces[number].dealt(tensor)

    def write(folder: Path) -> None:
        check_finite({k: v for k, v in rows.items() if k.startswith("weights.")}, head.step)
        writer = FileSystemWriter(folder / SHARDS)
        save_shards(tensors, storage_writer=writer, process_group=channel.group)
        if ranks.leads:
            with (folder / "optimizer.pt").open("wb") as file:
                torch.save(rest, file)

    return lambda: _saved(checkpoints, head, ranks, write, channel.meet, sharded=True)


def save_together(
    checkpoints: Path, head: Snapshot, ranks: Ranks, write: Callable[[Path], None]
) -> Path:
    """Write a checkpoint in which each rank has put its part by `write`; returns its folder once it
    is there.

    `write` must not return in any rank before all have written. Raises RunFailed as what `taken`
    returns.
    """
    target = folder_of(checkpoints, head.step)
    there = is_complete(target) and read_state(target).get("plan") == head.plan
    if ranks.told("there" if there else "") == "there":
        return target
    found = _saved(checkpoints, head, ranks, write, lambda: ranks.told(""), sharded=False)
    ranks.told("")  # it has its name
    return found


def _saved(
    checkpoints: Path,
    head: Snapshot,
    ranks: Ranks,
    write: Callable[[Path], None],
    meet: Callable[[], object],
    *,
    sharded: bool,
) -> Path:
    target = folder_of(checkpoints, head.step)
    try:
        whole = files.partial_folder(target) if ranks.leads else nullcontext(files.beside(target))
        with whole as folder:
            meet()  # the folder is there
            write(folder)
            if ranks.leads:
                write_state(folder, head, sharded=sharded)
    except (OSError, CheckpointException, RuntimeError) as error:
        if isinstance(error, RunFailed):
            raise
        if is_disconnected(_cause(error)):
            raise RanksLost(first_line(_cause(error))[:200]) from error
        older = latest(checkpoints)
        raise RunFailed(
            f"could not save the checkpoint of step {head.step}: {first_line(_cause(error))[:200]}",
            help=f"free space below {checkpoints} and run again: it goes on from "
            + (f"step {read_state(older)['step']}" if older else "the start"),
        ) from error
    return target


def restore(folder: Path, shards: Shards, optimizer: torch.optim.Optimizer, ema: Ema | None) -> int:
    """Set this rank's part to what a checkpoint holds, sharded or not, by any number of ranks;
    returns the updates done. Raises RunFailed if its format is not ours, or if it is damaged."""
    state = read_state(folder)
    names = list(shards.pieces)
    if state.get("sharded"):
        with reading(folder / "optimizer.pt", folder):
            rest = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        with reading(folder / SHARDS, folder):
            found = _own_rows(folder / SHARDS, shards)
    else:
        snapshot = load(folder)
        rest, found = dict(snapshot.optimizer), {}
        found |= _cut(shards, "weights", snapshot.weights)
        found |= _cut(shards, "ema", snapshot.ema or {})
        for number, kept in rest["state"].items():
            piece = shards.pieces[names[number]]
            for key, value in kept.items():
                if isinstance(value, Tensor) and value.shape == piece.whole.shape:
                    kept[key] = value[piece.rows].clone()
    states = {k.partition(".")[2]: v for k, v in found.items() if k.startswith("optimizer.")}
    rest = joined(rest, states)
    with torch.no_grad():
        for name, piece in shards.pieces.items():
            piece.mine.copy_(found[f"weights.{name}"])
    load_state(optimizer, rest)
    if ema is not None and f"ema.{names[0]}" in found:
        ema.load_state({name: found[f"ema.{name}"] for name in names})
    return int(state["step"])


def _parts(
    shards: Shards, optimizer: torch.optim.Optimizer, ema: Ema | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What each rank writes of its own, its rows, and what rank 0 writes for all."""
    rows: dict[str, Tensor] = {f"weights.{n}": p.mine.detach() for n, p in shards.pieces.items()}
    if ema is not None:
        rows |= {f"ema.{name}": tensor for name, tensor in ema.average.items()}
    state = optimizer.state_dict()
    pieces = list(shards.pieces.values())
    rest = {number: dict(kept) for number, kept in state["state"].items()}
    for number, kept in state["state"].items():
        for key, value in kept.items():
            if isinstance(value, Tensor) and value.shape == pieces[number].mine.shape:
                rows[f"optimizer.{number}.{key}"] = value
                del rest[number][key]
    return rows, {**state, "state": rest}


def _own_rows(folder: Path, shards: Shards) -> dict[str, Tensor]:
    """This rank's rows of every tensor in `folder`, in host memory."""
    reader = FileSystemReader(folder)
    stated: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    names = list(shards.pieces)
    held = {}
    for key, of in stated.items():
        kind, _, name = key.partition(".")
        number = name.partition(".")[0]
        piece = shards.pieces[names[int(number)] if kind == "optimizer" else name]
        rows = torch.empty(piece.mine.shape, dtype=of.properties.dtype)
        held[key] = piece.dealt(rows)
    read_into(held, reader)
    return {key: tensor.to_local().detach() for key, tensor in held.items()}


def _cut(shards: Shards, kind: str, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": tensor[shards.pieces[name].rows] for name, tensor in whole.items()}


def _cause(error: BaseException) -> BaseException:
    """What one of the ranks raised, if it was while they wrote together."""
    failures = getattr(error, "failures", {})
    found: BaseException = next((found[0] for found in failures.values()), error)
    return found
