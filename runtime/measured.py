"""What a run measured, to be set beside what was planned: `measured.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import evolve

from compiler.families import FAMILIES
from compiler.plan import Plan
from runtime.clock import Clock
from runtime.errors import RunFailed
from runtime.loop import Trained
from runtime.machine import look, versions
from runtime.memory.constants import OUTSIDE
from runtime.memory.gauge import Reading
from runtime.memory.sharing import SUMS
from runtime.met import met_readings
from runtime.one_more import evaluation_parts, step_parts
from runtime.out_of_memory import is_out_of_memory

CACHED = "all was cached"


def measured(plan: Plan, trained: Trained, clock: Clock, device: torch.device) -> dict[str, Any]:
    """The content of `measured.json`. Trains one step more, so nothing may follow.

    Memory is the device allocator's peak of each phase (CUDA); on the processor, which has no such
    thing, the peak of live tensors in one piece of each phase: the largest prompt, picture and
    drawing that the run had, and one step and one held-out batch more, of the plan's worst size.
    """
    readings = dict(clock.gauge.readings)
    if device.type == "cpu" and trained.shards is None:  # one more step is all ranks' to make
        readings |= _one_more(plan, trained)
    else:
        readings |= met_readings(trained, clock.gauge, clock.peak_bytes)
    planned = planned_peaks(plan, apart=device.type == "cpu")
    encoding = {"latents", *FAMILIES[plan.model.family].text_encoders}
    peaks = {name: peak for name, peak in clock.peak_bytes.items() if name not in encoding}
    for name, reading in readings.items():
        peak = reading.peak if device.type == "cpu" else clock.peak_bytes.get(name)
        if peak is not None:
            peaks[name] = peak
    return {
        "plan": plan.digest,
        "steps": plan.steps.total,
        "device": "cpu" if device.type == "cpu" else look().device_name,
        "versions": versions(),
        "seconds": {name: round(value, 3) for name, value in clock.seconds.items()},
        "memory": {
            name: row_of(planned.get(name), peaks.get(name), readings.get(name), name in encoding)
            for name in sorted(planned.keys() | peaks.keys())
        },
    }


def row_of(
    planned: Mapping[str, int] | None, peak: int | None, reading: Reading | None, encodes: bool
) -> dict[str, Any]:
    """One phase. `measured_on` is there where it is not what was planned: figures of unlike
    things say nothing of each other."""
    found: dict[str, Any] = {
        "planned_bytes": sum(planned.values()) if planned is not None else None,
        "planned_parts": dict(planned or {}),
        "measured_bytes": peak,
    }
    if reading is not None and reading.parts:
        found["measured_parts"] = dict(sorted(reading.parts.items(), key=lambda part: -part[1]))
    if reading is not None and reading.on != reading.planned:
        found |= {"planned_on": reading.planned, "measured_on": reading.on}
    if reading is None and encodes:
        found["note"] = CACHED
    return found


def _one_more(plan: Plan, trained: Trained) -> dict[str, Reading]:
    found = {}
    try:
        if plan.evaluation is not None:
            found["evaluate"] = _reading(evaluation_parts(plan, trained))
        passes, updates = step_parts(plan, trained)
    except RunFailed:  # its zeros gave no numbers: the training, which is over, was good
        return found
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return found  # its result is written, so the run has not failed
    update = _reading(updates)
    if any(SUMS in phase.parts for phase in plan.memory.phases if phase.name == "update"):
        update = evolve(update, on="one rank alone", planned="sums over ranks")
    return found | {"train": _reading(passes), "update": update}


def _reading(parts: Mapping[str, int]) -> Reading:
    return Reading(size=0, peak=sum(parts.values()), parts=parts)


def planned_peaks(plan: Plan, *, apart: bool = False) -> dict[str, dict[str, int]]:
    """Bytes by category of each phase that is measured, without what no allocator tells of.

    Unless they are told `apart`, a step is measured as a whole: what is planned for it is its
    passes or its update, whichever needs more.
    """
    found = {phase.name: dict(phase.parts) for phase in plan.memory.phases}
    update = {} if apart else found.pop("update", {})
    if sum(update.values()) > sum(found.get("train", {}).values()):
        found["train"] = update
    return {
        name: {part: n for part, n in parts.items() if part not in OUTSIDE}
        for name, parts in found.items()
    }
