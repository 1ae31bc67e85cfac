"""Device memory in the report: planned beside measured, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from tuner.formats import size
from tuner.html import table
from tuner.run_data import RunData

TITLES = (
    ("Phase", "tight"),
    ("", "bars"),
    ("Planned", "number"),
    ("Measured", "number"),
    ("Off by", "number"),
)


def memory_table(run: RunData) -> str:
    """The section; "" where nothing was planned or measured."""
    facts = _facts(run.measured)
    planned = (
        {phase.name: phase.device_bytes for phase in run.plan.memory.phases} if run.plan else {}
    )
    # What the device's allocator does not count (its context) was left out beside its figures.
    planned |= {
        name: row["planned_bytes"]
        for name, row in facts.items()
        if _is_bytes(row.get("planned_bytes"))
        and (_is_bytes(row.get("measured_bytes")) or name not in planned)
    }
    measured = measured_bytes(run.measured)
    names = [*planned, *(name for name in measured if name not in planned)]
    most = max([*planned.values(), *measured.values()], default=0)
    if not most:
        return ""
    rows = []
    for name in names:
        plan, real, row = planned.get(name), measured.get(name), facts.get(name, {})
        bars = bar(plan, most, "") + bar(real, most, " measured")
        off = f"{(plan - real) / real:+.1%}" if plan and real and is_like(row) else "-"
        rows.append((escape(name), bars, _bytes(plan), _bytes(real), off))
    key = "<span class='key'><i></i>planned<i class='measured'></i>measured</span>"
    if run.measured and not measured:
        key = "Planned only: this device does not tell what was allocated."
    notes = [note for name in names for note in _notes(name, facts.get(name, {}))]
    said = f"<p class='soft small'>{escape('; '.join(notes))}.</p>" if notes else ""
    title = "<h2>Device memory at its peak</h2>"
    return f"{title}<p class='soft small'>{key}</p>{table(TITLES, rows)}{said}"


def measured_bytes(measured: Mapping[str, Any]) -> dict[str, int]:
    """Peak device bytes by phase, from `measured.json`; a device may not tell of them."""
    return {
        name: row["measured_bytes"]
        for name, row in _facts(measured).items()
        if _is_bytes(row.get("measured_bytes"))
    }


def is_like(row: Mapping[str, Any]) -> bool:
    """Whether a phase was measured on what was planned."""
    return "measured_on" not in row


def bar(value: int | None, most: int, kind: str) -> str:
    """A bar as long as the share of `value` in `most`; none for none."""
    return f'<div class="bar{kind}" style="width:{100 * value / most:.1f}%"></div>' if value else ""


def _notes(name: str, row: Mapping[str, Any]) -> list[str]:
    if not is_like(row):
        return [f"{name} was measured on {row['measured_on']}, planned for {row.get('planned_on')}"]
    return [f"{name}: {row['note']}"] if "note" in row else []


def _facts(measured: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    phases = measured.get("memory")
    return {
        str(name): row
        for name, row in (phases.items() if isinstance(phases, Mapping) else ())
        if isinstance(row, Mapping)
    }


def _is_bytes(value: object) -> bool:
    return isinstance(value, int)


def _bytes(value: int | None) -> str:
    return size(value) if value else "-"
