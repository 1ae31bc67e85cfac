"""`events.jsonl`: what a run said and when, one object a line; what it repeats is not taken out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.events import Events

EVENTS = "events.jsonl"


class Journal:
    """Passes everything on, and writes down every message with its time and step."""

    def __init__(self, path: Path, events: Events) -> None:
        self._path, self._events = path, events
        self._step = 0

    def phase(self, name: str, total: int, unit: str) -> None:
        """See `Events.phase`."""
        self._events.phase(name, total, unit)

    def advance(self, done: int, **values: Any) -> None:
        """See `Events.advance`."""
        self._events.advance(done, **values)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """See `Events.step`."""
        self._step = int(metrics["step"])
        self._events.step(metrics)

    def message(self, text: str, level: str = "info") -> None:
        """See `Events.message`."""
        self.note(text, level)
        self._events.message(text, level)

    def note(self, text: str, level: str = "info", step: int | None = None) -> None:
        """Only write it down. A journal that can't be written spoils no run."""
        row = {"at": time.time(), "step": self._step if step is None else step}
        line = json.dumps({**row, "level": level, "text": text}) + "\n"
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(line)
