"""Progress bars on a terminal: one for each phase, under its name in the plan."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from compiler.plan import Plan
from tuner.eta import Countdown, Eta
from tuner.formats import clock
from tuner.lines import TITLES, Clock, measures, pace

COLOURS = {"warning": "yellow", "error": "red"}


class Bars:
    """`runtime.events.Events` for a terminal."""

    def __init__(self, plan: Plan, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._eta, self._left = Eta(plan, clock), Countdown(clock)
        self._total = plan.steps.total
        self._now = ""
        self._bars: dict[str, TaskID] = {}
        console = Console(file=stream, markup=False, highlight=False, emoji=False)
        self._progress = Progress(
            TextColumn("{task.description:<13}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[words]}", markup=False),
            console=console,
            refresh_per_second=4,
        )

    def phase(self, name: str, total: int, unit: str) -> None:
        """See `runtime.events.Events.phase`."""
        # Not earlier: while libraries are imported, what is printed goes to the run's log.
        self._progress.start()
        self._eta.phase(name)
        self._left.begin(total)
        self._finish_uncounted()
        self._now = name
        if name in self._bars and name != "train":
            self._progress.remove_task(self._bars.pop(name))
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(
                TITLES.get(name, name), total=total or None, count="", words="", unit=unit
            )

    def _finish_uncounted(self) -> None:
        """A phase of unknown length is done when the next one begins."""
        if self._now in self._bars:
            task = self._progress.tasks[self._progress.task_ids.index(self._bars[self._now])]
            if task.total is None:
                self._progress.update(task.id, total=1, completed=1)

    def advance(self, done: int, **values: Any) -> None:
        """See `runtime.events.Events.advance`."""
        if self._now in self._bars:
            task = self._progress.tasks[self._progress.task_ids.index(self._bars[self._now])]
            unit = task.fields["unit"]
            total = f"/{task.total:,.0f}" if task.total else ""
            self._left.advance(done)
            left = self._left.seconds_left()
            words = [f"{key} {value}" for key, value in values.items()]
            words += [f"eta {clock(left)}"] if left else []
            self._progress.update(
                task.id, completed=done, count=f"{done:,}{total} {unit}", words="  ".join(words)
            )

    def step(self, metrics: Mapping[str, Any]) -> None:
        """See `runtime.events.Events.step`."""
        if "train" not in self._bars:
            self.phase("train", self._total, "steps")
        self._now = "train"
        self._eta.step(metrics)
        left = self._eta.seconds_left()
        loss = measures({"loss": metrics["loss"]} if "loss" in metrics else {})
        words = [pace(self._eta.step_seconds), *loss]
        words += [f"eta {clock(left)}"] if left is not None else []
        self._progress.update(
            self._bars["train"],
            completed=int(metrics["step"]),
            count=f"{metrics['step']:,}/{self._total:,}",
            words="  ".join(filter(None, words)),
        )

    def message(self, text: str, level: str = "info") -> None:
        """See `runtime.events.Events.message`."""
        words = text if level == "info" else f"{level}: {text}"
        self._progress.console.print(Text(words, style=COLOURS.get(level, "")), soft_wrap=True)

    def close(self) -> None:
        """Leave the bars as they are and give the terminal back."""
        self._progress.stop()
