"""Notes in the run folder what a run is doing, for `tuner status` to read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tuner.progress import Shown

NOTE = "phase.json"
"""There while a run goes on: phase, how much of it is done, process, times. One that is left over
is of a run that was killed."""
EVERY_SECONDS = 2.0  # between two notes of the same phase


class Noted:
    """Passes everything on to `shown`, and notes phases in `folder`. A note that can't be written
    is no fault of the run's."""

    def __init__(self, shown: Shown, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._shown, self._path, self._clock = shown, folder / NOTE, clock
        self._note: dict[str, Any] = {}
        self._written = 0.0

    def phase(self, name: str, total: int, unit: str) -> None:
        """See `runtime.events.Events.phase`."""
        self._shown.phase(name, total, unit)
        if name == "publish":  # which may take long, and the run is finished
            self._report()
        now = self._clock()
        self._note = {"phase": name, "done": 0, "total": total, "unit": unit, "since": now}
        self._write(now)

    def advance(self, done: int, **values: Any) -> None:
        """See `runtime.events.Events.advance`."""
        self._shown.advance(done, **values)
        self._note["done"] = done
        self._maybe()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """See `runtime.events.Events.step`. How far training is, the metrics tell."""
        self._shown.step(metrics)

    def message(self, text: str, level: str = "info") -> None:
        """See `runtime.events.Events.message`."""
        self._shown.message(text, level)

    def close(self) -> None:
        """The run has ended by itself: nothing is left to note."""
        self._shown.close()
        if self._written:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _report(self) -> None:
        """A report that is there already if nobody waits for the end."""
        from tuner.report import write_report

        with suppress(OSError):
            write_report(self._path.parent)

    def _maybe(self) -> None:
        now = self._clock()
        if now - self._written >= EVERY_SECONDS:
            self._write(now)

    def _write(self, now: float) -> None:
        partial = self._path.with_name(f".partial-{NOTE}")
        text = json.dumps({**self._note, "seen": now, "pid": os.getpid()})
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self._path)
            self._written = now
        except OSError:  # a full disk leaves an empty one
            with suppress(OSError):
                partial.unlink(missing_ok=True)
