"""How much of what was planned runs on this machine did need: for the next plans. No torch.

    memory.json     {"format": 3, "phases": {KEY: {"ratio": ..., "runs": ...}}}

A key names the device, the phase and the kind of plan (see `alike`); a ratio is what was measured
over what was planned, both without what no tensor holds. The newest run counts. Deleting the file
costs only accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from compiler.costs import device_name
from compiler.machine import Machine
from compiler.memory import CORRECTION, Candidate, MemoryModel, Simulation
from compiler.plan import Phase, Plan, digest_of
from runtime.files import write_whole
from runtime.memory.alike import kind_of, kind_of_plan
from runtime.memory.constants import ALL, CUBLAS

FORMAT = 3
"""The first one kept bytes, which say nothing of a plan of another size; the second one ratios of
steps on a device that were not looked at, with shorter prompts than the plan's."""
CORRECTIONS = "memory.json"
"""Its name in the user's cache folder."""
LEAST = 2**20
"""Bytes; smaller differences are not worth a word."""
LOWEST, HIGHEST = 0.5, 1.5
"""Ratios that are taken. Compiled code may keep half of what is planned, for it is planned without;
nothing that is known takes half as much again. Beyond, unlike things were compared, or the file is
damaged."""


@frozen(kw_only=True)
class Correction:
    """What a phase needed, over what was planned; `runs` were measured."""

    ratio: float
    runs: int


def read(path: Path) -> dict[str, Correction]:
    """What `path` holds; nothing where it is missing, damaged or of another format, and no row that
    is not sound."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            return {}
        rows = {str(key): _read(row) for key, row in tree["phases"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {key: row for key, row in rows.items() if row is not None}


def _read(row: Any) -> Correction | None:
    if not isinstance(row, dict):
        return None
    ratio, runs = row.get("ratio"), row.get("runs")
    if not isinstance(ratio, float) or not LOWEST <= ratio <= HIGHEST:
        return None
    if not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
        return None
    return Correction(ratio=ratio, runs=runs)


def remember(
    path: Path, plan: Plan, machine: Machine, memory: Mapping[str, Mapping[str, Any]]
) -> bool:
    """Keep what a run of `plan` measured: `memory` of its `measured.json`. Raises OSError.

    False if it measured nothing, only pieces unlike those that were planned, or what `unlikely`
    tells of. What earlier runs had corrected in the plan is taken out of it first.
    """
    known = read(path)
    before = dict(known)
    for name, ratio in _ratios(memory).items():
        if LOWEST <= ratio <= HIGHEST:
            own = key(device_name(plan.device, machine), kind_of_plan(plan), name)
            runs = known[own].runs if own in known else 0
            known[own] = Correction(ratio=ratio, runs=runs + 1)
    if known == before:
        return False
    rows = {k: {"ratio": row.ratio, "runs": row.runs} for k, row in sorted(known.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"format": FORMAT, "phases": rows}, indent=1) + "\n")
    return True


def unlikely(memory: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The phases that needed so much more or less than was planned that no later plan is corrected
    by it: how many times as much."""
    return {n: ratio for n, ratio in _ratios(memory).items() if not LOWEST <= ratio <= HIGHEST}


def _ratios(memory: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    found = {}
    for name, row in memory.items():
        planned, measured = row.get("planned_bytes"), row.get("measured_bytes")
        if not isinstance(planned, int) or not isinstance(measured, int) or "measured_on" in row:
            continue
        parts = row.get("planned_parts", {})
        fixed = parts.get(CUBLAS, 0)
        own = planned - fixed - sum(n for part, n in parts.items() if part.startswith(CORRECTION))
        if own > 0:
            found[name] = (measured - fixed) / own
    return found


def key(device: str, kind: object, phase: str) -> str:
    """Names what a correction is worth being told to."""
    return digest_of([device, kind, phase])


class CorrectedMemoryModel:
    """A memory model whose answers are corrected by what the machine's device was seen to need."""

    def __init__(
        self, inner: MemoryModel, known: Mapping[str, Correction], machine: Machine
    ) -> None:
        self._inner, self._known, self._machine = inner, known, machine

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`. A phase's correction is a part of its own."""
        found, kind = self._inner.simulate(candidate), kind_of(candidate)
        return evolve(
            found, phases=tuple(self._corrected(candidate, kind, phase) for phase in found.phases)
        )

    def _corrected(self, candidate: Candidate, kind: object, phase: Phase) -> Phase:
        together = phase.name == "update" and candidate.device != "cpu"  # as they are measured
        device = device_name(candidate.device, self._machine)
        known = self._known.get(key(device, kind, "train" if together else phase.name))
        if known is None:
            return phase
        tensors = phase.device_bytes - sum(phase.parts.get(name, 0) for name in ALL)
        more = round((known.ratio - 1.0) * tensors)
        if abs(more) < LEAST:
            return phase
        return evolve(
            phase,
            device_bytes=phase.device_bytes + more,
            parts={**phase.parts, _named(known): more},
        )


def _named(known: Correction) -> str:
    return f"{CORRECTION} ({known.runs} run{'s' if known.runs > 1 else ''})"
