"""Checkpoints: everything a run needs to go on bit for bit, complete or absent.

    checkpoints/step-000400/
        weights.safetensors     what is trained, by parameter name
        ema.safetensors         its average, if the plan has one
    rival.safetensors       of a discriminator: its weights and what else it holds
    rival.pt                its optimizer's state
        optimizer.pt            the optimizer's state (torch.save, loads with weights_only)
        state.json              steps done, position, plan, versions, the loss scale, and the size
                                and checksum of each file

Where each rank holds a part of every weight, the tensors lie in `shards` instead, see
`runtime.sharded_saving`. There is no random state: randomness is a function of (seed, purpose,
step, sample).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime import files
from runtime.checksum import checksum
from runtime.errors import RunFailed, first_line
from runtime.events import Events
from runtime.out_of_memory import is_out_of_memory
from runtime.saved import (
    STATE,
    complete,
    fault,
    folder_of,
    is_complete,
    latest,
    read_state,
    step_of,
)
from runtime.shard_files import SHARDS, joined, read_whole

__all__ = [
    "Snapshot",
    "check_finite",
    "complete",
    "folder_of",
    "is_complete",
    "latest",
    "load",
    "read_state",
    "reading",
    "save",
    "set_aside",
    "step_of",
    "write_state",
]

FORMAT = 1
UNREADABLE = (
    OSError,
    EOFError,
    LookupError,
    RuntimeError,
    SafetensorError,
    ValueError,
    pickle.UnpicklingError,
)
"""What the libraries raise at files that are damaged."""


@frozen(kw_only=True)
class Snapshot:
    """A checkpoint in host memory. Nothing in it changes when training goes on."""

    step: int  # updates done
    epoch: int  # of the last window
    plan: str  # digest
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    ema: Mapping[str, Tensor] | None
    versions: Mapping[str, str]
    scaler: Mapping[str, Any] | None = None  # the loss scale's, where there is one
    rival: Mapping[str, Tensor] | None = None  # weights and buffers of what is trained in turns
    rival_optimizer: Mapping[str, Any] | None = None


def save(checkpoints: Path, snapshot: Snapshot) -> Path:
    """Write `snapshot`; returns its folder. One of the same step and plan is left as it is.

    Raises RunFailed if it can't be written (a full disk, weights that are no numbers); older
    checkpoints are untouched then.
    """
    target = folder_of(checkpoints, snapshot.step)
    if is_complete(target) and read_state(target).get("plan") == snapshot.plan:
        return target
    check_finite(snapshot.weights, snapshot.step)
    try:
        with files.partial_folder(target) as folder:
            _write(folder, snapshot)
    except (OSError, SafetensorError, RuntimeError) as error:
        older = latest(checkpoints)
        raise RunFailed(
            f"could not save the checkpoint of step {snapshot.step}: {error}",
            help=f"free space below {checkpoints} and run again: it goes on from "
            + (f"step {read_state(older)['step']}" if older else "the start"),
        ) from error
    return target


def check_finite(weights: Mapping[str, Tensor], step: int) -> None:
    """Raise RunFailed if a weight is no number: what an update left so must not take the place of
    what was good."""
    for name, tensor in weights.items():
        # Whatever is not finite stays in a sum; only a sum that overflowed needs a second look.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise RunFailed(
                f"step {step} left weights that are no numbers ({name}); it was not saved",
                help="older checkpoints are untouched. Likely causes: a learning rate that is too "
                "high, or updates that overflow the weights' number format",
            )


def _write(folder: Path, snapshot: Snapshot) -> None:
    save_file(_packed(snapshot.weights), folder / "weights.safetensors")
    if snapshot.ema is not None:
        save_file(_packed(snapshot.ema), folder / "ema.safetensors")
    with (folder / "optimizer.pt").open("wb") as file:
        torch.save(dict(snapshot.optimizer), file)
    if snapshot.rival is not None and snapshot.rival_optimizer is not None:
        save_file(_packed(snapshot.rival), folder / "rival.safetensors")
        with (folder / "rival.pt").open("wb") as file:
            torch.save(dict(snapshot.rival_optimizer), file)
    write_state(folder, snapshot)


def write_state(folder: Path, snapshot: Snapshot, *, sharded: bool = False) -> None:
    """The last file of the checkpoint in `folder`: what `snapshot` is, and all that is there."""
    there = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    state = {
        "format": FORMAT,
        "step": snapshot.step,
        "epoch": snapshot.epoch,
        "plan": snapshot.plan,
        "versions": dict(snapshot.versions),
        "scaler": snapshot.scaler,
        "sharded": sharded,
        "files": {p.relative_to(folder).as_posix(): p.stat().st_size for p in there},
        "checksums": {p.name: checksum(p) for p in there if p.parent == folder},
    }
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, as safetensors wants them (channels-last weights are not)."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def set_aside(checkpoints: Path, events: Events) -> None:
    """See that the newest complete checkpoint holds what was written. Where it does not, it is
    renamed, with a warning, and the one before it is the newest.

    Raises RunFailed where none does; nothing is renamed then. OSError if one can't be renamed.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(complete(checkpoints)):
        if not (why := fault(folder)):
            break
        damaged.append((folder, why))
    else:
        if damaged:
            raise RunFailed(
                f"no checkpoint is left to go on from: {damaged[0][1]}",
                help=f"bring it back from a copy, or remove {checkpoints} to begin from the start",
            )
    for folder, why in damaged:
        aside = folder.with_name(f"damaged-{folder.name}")
        files.remove_folder(aside)
        folder.rename(aside)
        events.message(f"{why}. {folder.name} is called {aside.name} now, and not used", "warning")


@contextmanager
def reading(path: Path, folder: Path) -> Iterator[None]:
    """Inside, `path` of the checkpoint `folder` is read; raises RunFailed, which names it, if that
    can't be done."""
    try:
        yield
    except UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        first = first_line(error)[:200]
        steps = map(step_of, complete(folder.parent))
        older = [step for step in steps if step < step_of(folder)]
        raise RunFailed(
            f"{path} can't be read: {first}",
            help=f"move {folder} away and run again: it goes on from "
            + (f"step {older[-1]}" if older else "the start"),
        ) from error


def load(folder: Path, *, checked: bool = False) -> Snapshot:
    """Read a checkpoint into host memory. Raises RunFailed if its format is not ours, or if it is
    damaged; whether it is, is not looked at again if it is `checked`."""
    if not checked and (why := fault(folder)):
        raise RunFailed(why, help=f"move {folder} away: another is used then")
    state = read_state(folder)
    if state["format"] != FORMAT:
        raise RunFailed(
            f"{folder} has checkpoint format {state['format']}; this version reads {FORMAT}"
        )
    optimizer = _unpickled(folder, "optimizer.pt")
    ema: Mapping[str, Tensor] | None = None
    rival: Mapping[str, Tensor] | None = None
    rival_optimizer: Mapping[str, Any] | None = None
    if "rival.safetensors" in state["files"]:
        rival = _tensors(folder, "rival.safetensors")
        rival_optimizer = _unpickled(folder, "rival.pt")
    if state.get("sharded"):
        with reading(folder / SHARDS, folder):
            kinds = read_whole(folder / SHARDS)
        weights, ema = kinds["weights"], kinds["ema"] or None
        optimizer = joined(optimizer, kinds["optimizer"])
    else:
        weights = _tensors(folder, "weights.safetensors")
        if "ema.safetensors" in state["files"]:
            ema = _tensors(folder, "ema.safetensors")
    return Snapshot(
        step=state["step"],
        epoch=state["epoch"],
        plan=state["plan"],
        weights=weights,
        optimizer=optimizer,
        ema=ema,
        versions=state["versions"],
        scaler=state.get("scaler"),
        rival=rival,
        rival_optimizer=rival_optimizer,
    )


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    with reading(folder / name, folder):
        return load_file(folder / name)


def _unpickled(folder: Path, name: str) -> dict[str, Any]:
    with reading(folder / name, folder):
        found = torch.load(folder / name, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError("it holds no state of an optimizer")
        return found
