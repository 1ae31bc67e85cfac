"""Checkpoints: everything a run needs to go on bit for bit, complete or absent.

    checkpoints/step-000400/
        weights.safetensors     what is trained, by parameter name
        ema.safetensors         its average, if the plan has one
    rival.safetensors       of a discriminator: its weights and what else it holds
    rival.pt                its optimizer's state
        optimizer.pt            the optimizer's state (torch.save, loads with weights_only)
        state.json              steps done, position, plan, versions, the loss scale, and the size
                                of each file

Where each rank holds a part of every weight, the tensors lie in `shards` instead, see
`runtime.sharded_saving`. There is no random state: randomness is a function of (seed, purpose,
step, sample).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime import files
from runtime.errors import RunFailed
from runtime.saved import STATE, complete, folder_of, is_complete, latest, read_state, step_of
from runtime.shard_files import SHARDS, joined, read_whole

__all__ = [
    "Snapshot",
    "complete",
    "folder_of",
    "is_complete",
    "latest",
    "load",
    "read_state",
    "save",
    "step_of",
    "write_state",
]

FORMAT = 1


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

    Raises RunFailed if it can't be written (a full disk); older checkpoints are untouched then.
    """
    target = folder_of(checkpoints, snapshot.step)
    if is_complete(target) and read_state(target)["plan"] == snapshot.plan:
        return target
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
    }
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, as safetensors wants them (channels-last weights are not)."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def load(folder: Path) -> Snapshot:
    """Read a checkpoint into host memory. Raises RunFailed if its format is not ours."""
    state = read_state(folder)
    if state["format"] != FORMAT:
        raise RunFailed(
            f"{folder} has checkpoint format {state['format']}; this version reads {FORMAT}"
        )
    optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    ema: Mapping[str, Tensor] | None = None
    rival: Mapping[str, Tensor] | None = None
    rival_optimizer: Mapping[str, Any] | None = None
    if "rival.safetensors" in state["files"]:
        rival = load_file(folder / "rival.safetensors")
        rival_optimizer = torch.load(folder / "rival.pt", map_location="cpu", weights_only=True)
    if state.get("sharded"):
        kinds = read_whole(folder / SHARDS)
        weights, ema = kinds["weights"], kinds["ema"] or None
        optimizer = joined(optimizer, kinds["optimizer"])
    else:
        weights = load_file(folder / "weights.safetensors")
        if "ema.safetensors" in state["files"]:
            ema = load_file(folder / "ema.safetensors")
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
