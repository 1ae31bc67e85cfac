"""What happened in a run besides its steps: stops, messages, steps passed over, values that stood
out."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from html import escape
from typing import Any

from tuner.formats import counted
from tuner.html import table
from tuner.run_data import RunData

MOST = 200  # events that are shown, the newest
MOST_STEPS = 20  # steps named in one sentence
WATCHED = (("loss", "the loss"), ("grad_norm", "the gradient norm"))


def events(run: RunData) -> str:
    """The section; "" where there is nothing to tell."""
    words = "".join(f"<p class='soft'>{escape(line)}</p>" for line in sentences(run))
    shown = run.events[-MOST:]
    rows = [
        (_time(row), _step(row), f'<span class="{_level(row)}">{escape(str(row["text"]))}</span>')
        for row in shown
    ]
    titles = (("When", "tight"), ("Step", "number"), ("What", ""))
    listed = table(titles, rows, "events") if rows else ""
    if len(shown) < len(run.events):
        listed += f"<p class='soft small'>{len(run.events) - len(shown):,} older ones left out.</p>"
    return f"<h2>Events</h2>{words}{listed}" if words or listed else ""


def sentences(run: RunData) -> list[str]:
    """Spikes and steps passed over, in words."""
    found = []
    for key, name in WATCHED:
        steps = run.spikes(key)
        if steps:
            found.append(
                f"{name[0].upper()}{name[1:]} stood far above its running median at "
                f"{_listed(steps)}; training was left as it is."
            )
    if run.skipped:
        steps = [float(row["step"]) for row in run.skipped]
        found.append(
            f"{counted(len(steps), 'step')} changed no weight, because the loss or a gradient was "
            f"not finite: {_listed(steps)}."
        )
    return found


def _listed(steps: list[float]) -> str:
    shown = ", ".join(f"{step:,.0f}" for step in steps[:MOST_STEPS])
    more = f" and {len(steps) - MOST_STEPS:,} more" if len(steps) > MOST_STEPS else ""
    return f"step{'s' if len(steps) > 1 else ''} {shown}{more}"


def _time(row: Mapping[str, Any]) -> str:
    try:
        return datetime.fromtimestamp(float(row["at"])).strftime("%Y-%m-%d %H:%M:%S")
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return "-"


def _step(row: Mapping[str, Any]) -> str:
    step = row.get("step")
    return f"{step:,}" if isinstance(step, int) else "-"


def _level(row: Mapping[str, Any]) -> str:
    level = row.get("level")
    return level if level in ("warning", "error") else "info"
