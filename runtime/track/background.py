"""Tells a tracker in the background: training neither waits for it nor ends with it.

What a service could not be told is tried again, each time after a longer pause. How far it was told
is kept in the run folder, so that a run which goes on repeats nothing and catches up on what the
service has missed.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from runtime.errors import first_line
from runtime.events import Events
from runtime.track.base import Tracker

MOST = 20_000  # records that wait; of more the newest are left out
PAUSES = (1.0, 2.0, 5.0, 15.0, 60.0)  # seconds before the next attempts; then the last of them
CLOSING_SECONDS = 60.0  # how long the end of a run waits for what is left

Record = tuple[int, Callable[[], None]]  # step, what to call


class Background:
    """A tracker that is told by a thread of its own."""

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        events: Events,
        state: Path | None = None,
        *,
        missed: Iterable[Mapping[str, Any]] = (),
        pauses: tuple[float, ...] = PAUSES,
        closing: float = CLOSING_SECONDS,
    ) -> None:
        """`state` keeps how far the tracker was told (None: it repeats itself without harm),
        `missed` are the metrics up to now."""
        self._name, self._tracker, self._events = name, tracker, events
        self._state, self._pauses, self._closing = state, pauses, closing
        self._sent = sent(state) if state else 0
        self._waiting: queue.Queue[Record | None] = queue.Queue()
        self._giving_up = threading.Event()
        self._said = False
        self._lost = 0
        for row in missed:
            self.metrics(int(row["step"]), {k: v for k, v in row.items() if k != "step"})
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Told later; a step that was told before is left out."""
        if step > self._sent or self._sent == 0:
            self._put((step, lambda: self._tracker.metrics(step, values)))

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Told later."""
        if step >= self._sent:
            self._put((0, lambda: self._tracker.picture(step, name, image)))

    def close(self) -> None:
        """Waits for what is left, but not for ever; the metrics have all of it anyway."""
        self._waiting.put(None)
        self._thread.join(self._closing)
        if self._thread.is_alive():
            self._giving_up.set()
            self._thread.join(1.0)
            self._lost += max(self._waiting.qsize() - 1, 0)
        if self._lost:
            self._say(f"tracker `{self._name}` was not told of {self._lost} records")

    def _put(self, record: Record) -> None:
        if self._waiting.qsize() >= MOST:
            self._lost += 1
        else:
            self._waiting.put(record)

    def _work(self) -> None:
        while (record := self._waiting.get()) is not None:
            step, tell = record
            if not self._told(tell):
                return
            if step and self._state:
                self._remember(step, self._state)
        self._told(self._tracker.close)

    def _told(self, tell: Callable[[], None]) -> bool:
        """Try until it works; False if the run has ended meanwhile."""
        for attempt in range(1_000_000):
            try:
                tell()
                return True
            except Exception as error:
                self._failed(error)
            if self._giving_up.wait(self._pauses[min(attempt, len(self._pauses) - 1)]):
                break
        self._lost += 1
        return False

    def _failed(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            first = first_line(error)
            self._say(
                f"tracker `{self._name}` can't be told ({first}); training goes on, and it is "
                "tried again"
            )

    def _say(self, text: str) -> None:
        self._events.message(f"{text}; metrics.jsonl has everything", "warning")

    def _remember(self, step: int, state: Path) -> None:
        """Not synced: what a loss of power takes is told twice, and no more."""
        with suppress(OSError):
            partial = state.with_name(f".partial-{state.name}")
            partial.write_text(json.dumps({"sent": step, "at": time.time()}), encoding="utf-8")
            partial.replace(state)


def sent(state: Path) -> int:
    """The last step that a tracker was told of; 0 if there is none."""
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["sent"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
