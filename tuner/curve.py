"""Curves drawn in characters."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from compiler.plan import Schedule
from compiler.schedules import curve

BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # eighths, from empty to full
EIGHTHS = len(BLOCKS) - 1
ROWS = 3
COLUMNS = 60


def draw(schedule: Schedule, peak: str) -> list[str]:
    """Rows of blocks with `peak` (the recipe's learning rate) at the top left, 0 at the bottom."""
    levels = [round(share * ROWS * EIGHTHS) for share in curve(schedule, COLUMNS)]
    labels = [peak, *[""] * (ROWS - 2), "0"]
    width = max(map(len, labels))
    rows = [
        f"  {label:>{width}} {_row(levels, ROWS - 1 - row)}".rstrip()
        for row, label in enumerate(labels)
    ]
    last = f"{schedule.length:,}"
    return [*rows, f"  {'':>{width}} step 1{last:>{COLUMNS - 6}}"]


def _row(levels: list[int], row: int) -> str:
    return "".join(BLOCKS[max(0, min(EIGHTHS, level - row * EIGHTHS))] for level in levels)


def sparkline(values: Sequence[float], columns: int = 24) -> str:
    """The last `columns` values as blocks, from the lowest (one eighth) to the highest (full);
    blanks where they are not finite."""
    shown = values[-columns:]
    known = [value for value in shown if isfinite(value)] or [0.0]
    low, span = min(known), max(known) - min(known)
    return "".join(
        BLOCKS[(1 + round((v - low) / span * (EIGHTHS - 1)) if span else 4) if isfinite(v) else 0]
        for v in shown
    )
