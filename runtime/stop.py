"""Stop requests: Ctrl-C and SIGTERM finish the step and save; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from runtime.events import Events

SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM") if hasattr(signal, n))


class Stop:
    """Whether someone asked the run to stop.

    Inside `patient`, the first signal only sets `requested`; anywhere else, and at the second
    signal, KeyboardInterrupt is raised on the spot (nothing is lost: files appear whole).
    """

    def __init__(self, events: Events) -> None:
        self.requested = False
        self._patient = False
        self._events = events

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Inside, signals come here. Only the main thread of a program can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, the code looks at `requested` often and stops in good order."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _on_signal(self, number: int, frame: FrameType | None) -> Any:
        if self.requested or not self._patient:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        again = "; once more stops at once" if name == "SIGINT" else ""
        self._events.message(f"{name}: stopping after this step, with a checkpoint{again}")
