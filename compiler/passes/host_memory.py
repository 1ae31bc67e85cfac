"""Whether what a plan keeps in host memory finds room in the machine's."""

from __future__ import annotations

from collections.abc import Sequence

from compiler.draft import Draft
from compiler.memory import gib
from compiler.optimizers import OPTIMIZERS
from compiler.plan import Layout, Phase
from compiler.spans import KeyPath


def judge_host(draft: Draft, layout: Layout, phases: Sequence[Phase]) -> None:
    """Warn of the phase that needs most there, if it needs more than there is in all.

    Of a machine with a device that was named an amount is assumed. Nothing is said where the device
    is not even known.
    """
    total = draft.machine.host_total_bytes
    if not total or draft.device != draft.machine.device:
        return
    worst = max(phases, key=lambda phase: _needed(draft, phase))
    if _needed(draft, worst) <= total:
        return
    savings = dict(_savings(draft, layout, worst.name))
    where = next((path for path in savings if draft.given(path)), ("model", "base"))
    machine = "this machine has" if draft.machine.here else "a machine elsewhere is taken to have"
    draft.warn(
        "host-too-small",
        where if draft.given(where) else ("model",),
        f"`{worst.name}` needs {gib(_needed(draft, worst))} of host memory{_for(draft)}, and "
        f"{machine} {gib(total)}: with no more, the system would swap, or end the run",
        help=", or ".join([*savings.values(), "take a machine with more memory"]),
    )


def _needed(draft: Draft, phase: Phase) -> int:
    """Bytes on the host; where it is the device too, all. Of several processes, which all have
    what waits there, together: they are taken to be on one machine."""
    return _processes(draft) * (
        phase.host_bytes + (phase.device_bytes if draft.device == "cpu" else 0)
    )


def _processes(draft: Draft) -> int:
    """How many have as much: of a model that is trained whole, most is the first one's, which
    copies it to save it."""
    return draft.steps.ranks if draft.steps and draft.adapter is not None else 1


def _for(draft: Draft) -> str:
    count = _processes(draft)
    return f" for {count} processes" if count > 1 else ""


def _savings(draft: Draft, layout: Layout, phase: str) -> list[tuple[KeyPath, str]]:
    """What may lie on the host in a phase: the key that puts it there, and what to do."""
    assert draft.model is not None and draft.optimizer is not None
    offload: KeyPath = ("memory", "offload")
    found: list[tuple[KeyPath, str]] = []
    if phase == "latents" or phase in draft.model.family.text_encoders:
        name = "vae" if phase == "latents" else phase  # its weights are read there, then moved
        return [(("model", name), "make swap space for the time of encoding")]
    if draft.device != "cpu" and layout.offload_activations and phase == "train":
        found.append(((*offload, "activations"), "set `memory.offload.activations = false`"))
    if draft.device != "cpu" and layout.offload_blocks:
        found.append(((*offload, "blocks"), "offload fewer `memory.offload.blocks`"))
    if phase == "load":
        return found
    if OPTIMIZERS[draft.optimizer.name].host_bytes:
        found.append((("train", "optimizer"), "take an optimizer that is not in host memory"))
    if draft.ema is not None and draft.device != "cpu" and draft.ema.device == "cpu":
        found.append((("train", "ema", "device"), 'set `train.ema.device = "same"`'))
    if draft.adapter is None:
        found.append(
            (
                ("model", "base"),
                "train an adapter, whose checkpoints are small: they are copied there",
            )
        )
    return found
