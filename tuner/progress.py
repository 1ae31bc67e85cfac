"""What a run shows while it goes on: bars on a terminal, else a line now and then, on stderr."""

from __future__ import annotations

import sys
from typing import Protocol, TextIO

from compiler.plan import Plan
from runtime.events import Events
from tuner.lines import Lines
from tuner.screen import lively


class Shown(Events, Protocol):
    """Events that are shown to a person."""

    def close(self) -> None:
        """No more will come."""
        ...


def progress(plan: Plan, stream: TextIO | None = None) -> Shown:
    """Bars if `stream` (by default stderr) is a terminal that may move, else plain lines."""
    stream = stream or sys.stderr
    if lively(stream):
        from tuner.bars import Bars

        return Bars(plan, stream)
    return Lines(plan, stream)
