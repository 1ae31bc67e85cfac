"""What a person can do whose run was out of memory: only what this run can be given.

A run that has trained goes on under some settings and under others not (`runtime.folder.compare`):
where and when is computed is its own affair, the size of the parts of a batch may be accepted, and
what the bits of the base or the optimizer's state are is settled, but for the way down the ladder
(`on_oom = "next-rung"`), which may take another format of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compiler import rungs
from compiler.memory import gib
from compiler.plan import Plan
from runtime.folder import has_trained

PARTS, PARTS_OF_PLAN = "memory.micro_batch", "steps.micro_batch"
LESS = "a smaller batch or resolution"
BY_ITSELF = 'on_oom = "next-rung" in [memory]'


def advice(plan: Plan, phase: str, *, on_host: bool = False) -> str:
    """One sentence without an end. `on_host`: it was the host's memory."""
    begun = has_trained(Path(plan.run_folder))
    if on_host:
        return "close what else takes host memory and run it again"
    if phase in rungs.apart(plan):
        return _encoding(plan, phase, begun=begun)
    found = rungs.next_rung(plan)
    if found is None or found[0].peak_bytes >= rungs.needed(plan, phase):
        return _smaller(phase, begun=begun)
    rung, changed = found
    return f"the next rung needs {gib(rung.peak_bytes)}: {_next(plan, changed, begun=begun)}"


def _next(plan: Plan, changed: Mapping[str, str], *, begun: bool) -> str:
    """How to get to the next rung."""
    options = " ".join(f"--set {key}={value}" for key, value in changed.items())
    if PARTS in changed and begun:
        options += f" --accept-change {PARTS_OF_PLAN}"
    again = f"run it again with {options}"
    if begun and any(not key.startswith("memory.") for key in changed):
        again = f"that takes a fresh run (another `name`) with {options}"
        rest = "which goes on with what this run can take"
    else:
        rest = "which does so by itself"
    return again if plan.memory.on_oom == "next-rung" else f"{again}, or say {BY_ITSELF}, {rest}"


def _smaller(phase: str, *, begun: bool) -> str:
    """Where no rung is known to need less than `phase` was planned to."""
    if phase == "validate":
        return "draw smaller pictures (`sizes` in [validation]) and run it again"
    if begun:
        return f"close what else takes memory of the device; {LESS} takes a fresh run"
    return "lower the batch size or the resolution"


def _encoding(plan: Plan, phase: str, *, begun: bool) -> str:
    """What the ladder has no say in. A run that has trained keeps to its embeddings and latents."""
    close = "close what else takes memory of the device and run it again"
    if begun:
        return close
    parts = {part.name: part for part in plan.model.components}
    learns = {
        name for each in (plan.text_training, plan.embeddings) if each for name in each.encoders
    }
    if phase in parts and phase not in learns and parts[phase].quantize == "none":
        return f"{close}, or with --set model.{phase}.quantize=int8"
    if phase == "latents" and plan.vae_batch > 1:
        return f"{close}, or with --set cache.batch=1"
    if phase == "latents" and not parts["vae"].tiling:
        return f"{close}, or with --set model.vae.tiling=true"
    return close
