"""What runs on this machine needed beside what was planned: for the next plans. No torch.

    memory.json     {"format": 1, "phases": {KEY: {"bytes": ..., "runs": ...}}}

A key names the device, the family, what is trained and how, and the phase. The newest run counts.
Deleting the file costs only accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from compiler.adapters import result_name
from compiler.costs import device_name
from compiler.machine import Machine
from compiler.memory import CORRECTION, Candidate, MemoryModel, Simulation
from compiler.plan import Adapter, Phase, Plan, digest_of
from runtime.files import write_whole
from runtime.new_tokens import encoders_of

FORMAT = 1
CORRECTIONS = "memory.json"
"""Its name in the user's cache folder."""
LEAST = 2**20
"""Bytes; smaller differences are not worth a word."""


@frozen(kw_only=True)
class Correction:
    """What a phase needed beside what was planned; `runs` were measured."""

    bytes: int
    runs: int


def read(path: Path) -> dict[str, Correction]:
    """What `path` holds; nothing where it is missing, damaged or of another format."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            return {}
        return {
            str(key): Correction(bytes=int(row["bytes"]), runs=int(row["runs"]))
            for key, row in tree["phases"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def remember(
    path: Path, plan: Plan, machine: Machine, memory: Mapping[str, Mapping[str, Any]]
) -> bool:
    """Keep what a run of `plan` measured: `memory` of its `measured.json`. Raises OSError.

    False if it measured nothing, or only pieces unlike those that were planned. What earlier runs
    had corrected in the plan is added up.
    """
    known = read(path)
    before = dict(known)
    for name, row in memory.items():
        planned, measured = row.get("planned_bytes"), row.get("measured_bytes")
        if not isinstance(planned, int) or not isinstance(measured, int) or "measured_on" in row:
            continue
        own = key(
            device_name(plan.device, machine),
            plan.model.family,
            plan.adapter,
            plan.precision.compute,
            name,
            encoders_of(plan.text_training, plan.embeddings),
        )
        applied = int(row.get("planned_parts", {}).get(CORRECTION, 0))
        runs = known[own].runs if own in known else 0
        known[own] = Correction(bytes=measured - planned + applied, runs=runs + 1)
    if known == before:
        return False
    rows = {k: {"bytes": row.bytes, "runs": row.runs} for k, row in sorted(known.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"format": FORMAT, "phases": rows}, indent=1) + "\n")
    return True


def key(
    device: str,
    family: str,
    adapter: Adapter | None,
    compute: str,
    phase: str,
    encoders: Sequence[str] = (),
) -> str:
    """Names what a correction is worth being told to. `encoders` are in each step too."""
    return digest_of([device, family, result_name(adapter), compute, phase, *encoders])


class CorrectedMemoryModel:
    """A memory model whose answers are corrected by what the machine's device was seen to need."""

    def __init__(
        self, inner: MemoryModel, known: Mapping[str, Correction], machine: Machine
    ) -> None:
        self._inner, self._known, self._machine = inner, known, machine

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`. A phase's correction is a part of its own."""
        found = self._inner.simulate(candidate)
        return evolve(
            found, phases=tuple(self._corrected(candidate, phase) for phase in found.phases)
        )

    def _corrected(self, candidate: Candidate, phase: Phase) -> Phase:
        together = phase.name == "update" and candidate.device != "cpu"  # as they are measured
        name = "train" if together else phase.name
        own = key(
            device_name(candidate.device, self._machine),
            candidate.model.family,
            candidate.adapter,
            candidate.precision.compute,
            name,
            encoders_of(candidate.text_training, candidate.embeddings),
        )
        known = self._known.get(own)
        if known is None or abs(known.bytes) < LEAST:
            return phase
        return evolve(
            phase,
            device_bytes=phase.device_bytes + known.bytes,
            parts={**phase.parts, CORRECTION: known.bytes},
        )
