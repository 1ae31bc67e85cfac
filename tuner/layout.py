"""Lines of at most 80 columns: what the plan and the doctor are set in."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 80
INDENT = 10  # columns of a section's name


def pair(left: str, right: str) -> list[str]:
    """`left`, and `right` at the right margin; on a line of its own where both do not fit."""
    if not right:
        return [left.rstrip()]
    if len(left) + 2 + len(right) <= WIDTH:
        return [left + right.rjust(WIDTH - len(left))]
    return [left.rstrip(), right.rjust(WIDTH)]


def wrapped(text: str, first: str, rest: str) -> list[str]:
    """`text` broken at spaces; a longer word (a path) stays whole, so that it can be copied."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]


def section(name: str, text: str, right: str = "") -> list[str]:
    """The first line of a section: its name, what it says, and where that came from."""
    *above, last = wrapped(text, name.ljust(INDENT), " " * INDENT)
    return [*above, *pair(last, right)]


def columns(rows: Sequence[Sequence[str]], indent: int = 2) -> list[str]:
    """Rows of left-aligned cells, two spaces apart; the last cell is wrapped under itself."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines: list[str] = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        head = " " * indent + "".join(f"{cell}  " for cell in cells)
        lines += wrapped(row[-1], head, " " * len(head)) if row[-1] else [head.rstrip()]
    return lines
