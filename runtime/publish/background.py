"""Jobs that are done one after the other by a thread, each tried several times."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from runtime.events import Events

PAUSES = (2.0, 10.0, 30.0, 120.0)  # seconds before the second, third, ... attempt

Job = Callable[[], None]


class Hopeless(Exception):
    """Trying again would not help; the message says why."""


class Jobs:
    """A queue of jobs. A job that fails for good is said, and the next one is taken."""

    def __init__(self, events: Events, pauses: tuple[float, ...] = PAUSES) -> None:
        self._events, self._pauses = events, pauses
        self._waiting: queue.Queue[tuple[str, Job] | None] = queue.Queue()
        self._giving_up = threading.Event()
        self._thread: threading.Thread | None = None
        self.failed: list[str] = []  # names of jobs that failed for good

    def add(self, name: str, job: Job) -> None:
        """Do `job` when those before it are done; `name` is what it does, for messages."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="publish", daemon=True)
            self._thread.start()
        self._waiting.put((name, job))

    def close(self, seconds: float | None = None) -> None:
        """Wait for all jobs, or at most so many seconds; then no job is tried again."""
        if self._thread is None:
            return
        self._waiting.put(None)
        self._thread.join(seconds)
        self._giving_up.set()

    def _work(self) -> None:
        while (entry := self._waiting.get()) is not None:
            name, job = entry
            try:
                self._attempt(name, job)
            except Exception as error:
                self.failed.append(name)
                first = (str(error) or type(error).__name__).splitlines()[0]
                self._events.message(f"could not {name}: {first}", "warning")

    def _attempt(self, name: str, job: Job) -> None:
        for number, pause in enumerate((*self._pauses, None), 1):
            try:
                job()
                return
            except Hopeless:
                raise
            except Exception as error:
                if pause is None or self._giving_up.is_set():
                    raise
                if number == 1:
                    first = (str(error) or type(error).__name__).splitlines()[0]
                    self._events.message(f"could not {name} yet ({first}); it is tried again")
                if self._giving_up.wait(pause):
                    raise
