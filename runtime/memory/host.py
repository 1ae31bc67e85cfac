"""Host memory of each phase: what waits there for the device, and what is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from compiler.memory import Candidate
from compiler.optimizers import OPTIMIZERS
from runtime.memory.rounding import rounded
from runtime.memory.zero import on_host
from runtime.new_tokens import encoders_of

TRAINED = ("train", "update", "evaluate", "validate", "save")
"""Phases in which what is trained is there."""


class Traced(Protocol):
    """What is needed of a trace."""

    @property
    def load(self) -> Mapping[str, int]:
        """Bytes by category once the model is there."""
        ...

    @property
    def trainable(self) -> int:
        """Parameters that the optimizer updates."""
        ...

    @property
    def trained_bytes(self) -> int:
        """Bytes of what the optimizer updates."""
        ...

    @property
    def host(self) -> int:
        """What belongs on the device and waits on the host, at most in a step."""
        ...

    @property
    def parked(self) -> int:
        """What of it waits there between steps, too."""
        ...

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        ...

    @property
    def save(self) -> Mapping[str, int]:
        """Bytes by category between two steps."""
        ...


def bytes_of(candidate: Candidate, trace: Traced) -> dict[str, int]:
    """Bytes on the host by phase, beside those on the device.

    Where the device is the host itself, only the copy that a checkpoint is written from, which
    stays from the first save on, for training goes on while it is written; and the model of CLIP
    scores.
    """
    kept = sum(trace.save.get(name, 0) for name in ("adapter", "optimizer", "ema"))
    kept += _average(candidate, trace) + _states(candidate, trace)
    if candidate.adapter is None:
        kept += trace.save.get("weights", 0)
    # The weights wait there while the average is judged, see `Ema.swapped`.
    swapped = trace.trained_bytes if candidate.ema_on_device or candidate.ema_on_host else 0
    if OPTIMIZERS[candidate.optimizer.name].averages:  # or what is trained, see `kept_weights`
        swapped += trace.trained_bytes
    several, strategy = candidate.ranks > 1, candidate.sharing.strategy
    zero, sharded = several and strategy == "deepspeed", several and strategy != "ddp"
    if sharded and not zero:  # each rank has its own part
        kept, swapped = -(-kept // candidate.ranks), -(-swapped // candidate.ranks)
    kept += candidate.clip_bytes  # there from the first step on
    more = dict.fromkeys(("evaluate", "validate"), swapped)
    if candidate.device == "cpu":
        return {name: kept + more.get(name, 0) for name in TRAINED}
    vae = next(c for c in candidate.model.components if c.name == "vae")
    waiting = trace.parked + _average(candidate, trace) + _updated(candidate, trace)
    if candidate.pictures:
        waiting += rounded(vae.parameters * (4 if vae.dtype == "float32" else 2))
    found = {name: kept + waiting + more.get(name, 0) for name in TRAINED}
    found["train"] += trace.host - trace.parked  # activations
    if OPTIMIZERS[candidate.optimizer.name].host_bytes:  # gradients come there to be used
        found["update"] += trace.trained_bytes
    found["load"] = trace.largest + trace.parked  # weights come one at a time
    if candidate.layout.offload_blocks:  # all are on the host before some go to the device
        found["load"] += trace.load.get("weights", 0)
    if sharded:  # or all of them, to be dealt out from there
        found["load"] = sum(trace.load.values())
    if zero:  # its checkpoint is written where it lies
        apart = on_host(candidate, trace.trainable, trace.save.get("optimizer", 0))
        found |= {name: found[name] + apart for name in TRAINED}
    encoders = encoders_of(candidate.text_training, candidate.embeddings)
    if encoders:  # each is read as a whole
        beside = [c for c in candidate.model.components if c.name in encoders]
        sizes = [rounded(c.parameters * (4 if c.dtype == "float32" else 2)) for c in beside]
        found["load"] = max(found["load"], *sizes)
    name = candidate.model.trained_component
    trained = next(c for c in candidate.model.components if c.name == name)
    if trained.file:  # in other names than Diffusers', all of it is translated there
        whole = rounded(trained.parameters * (4 if trained.dtype == "float32" else 2))
        found["load"] = max(found["load"], whole)
    return found


def encoding(candidate: Candidate, phases: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Of the phases before training: an encoder's weights are read to the host, then moved."""
    if candidate.device == "cpu":
        return {}
    return {name: parts.get("weights", 0) for name, parts in phases.items()}


def _average(candidate: Candidate, trace: Traced) -> int:
    """An average on the host, in float32."""
    return 4 * trace.trainable if candidate.ema_on_host else 0


def _states(candidate: Candidate, trace: Traced) -> int:
    """What an optimizer keeps on the host."""
    return round(OPTIMIZERS[candidate.optimizer.name].host_bytes * trace.trainable)


def _updated(candidate: Candidate, trace: Traced) -> int:
    """That, and its copy of the weights, which it updates there."""
    states = _states(candidate, trace)
    return states + trace.trained_bytes if states else 0
