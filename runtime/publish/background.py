"""Jobs that are done one after the other by a thread, each tried several times."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from attrs import frozen

from runtime.errors import first_line
from runtime.events import Events

PAUSES = (2.0, 10.0, 30.0, 120.0)  # seconds before the second, third, ... attempt
LONGEST_PAUSE_AT_THE_END = 2.0  # seconds: somebody waits

Job = Callable[[], None]


class Hopeless(Exception):
    """Trying again would not help; the message says why."""


def _nothing() -> None:
    pass


@frozen(eq=False, kw_only=True)
class Entry:
    """A job that waits or is under way."""

    name: str  # what it does, for messages
    job: Job
    target: str  # whom it asks; one that does not answer is not asked by each job again
    over: Job  # called once, however the job ends; also where it is never begun
    bytes: int  # that it sends


class Jobs:
    """A queue of jobs. A job that fails for good is said, and the next one is taken.

    Of a target that could not be reached the next jobs are tried once each, until one succeeds; and
    once `wait` was called, not at all.
    """

    def __init__(self, events: Events, pauses: Sequence[float] = PAUSES) -> None:
        self._events, self._pauses = events, pauses
        self._waiting: deque[Entry] = deque()
        self._now: Entry | None = None
        self._changed = threading.Condition()
        self._ending = self._given_up = False
        self._down: set[str] = set()  # targets whose last job failed
        self._lost: set[str] = set()  # and those of which that was while somebody waited
        self._thread: threading.Thread | None = None
        self.failed: list[str] = []  # names of jobs that failed for good

    def add(
        self, name: str, job: Job, *, target: str = "", over: Job = _nothing, bytes: int = 0
    ) -> None:
        """Do `job` when those before it are done; see `Entry`."""
        entry = Entry(name=name, job=job, target=target or name, over=over, bytes=bytes)
        with self._changed:
            self._waiting.append(entry)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="publish", daemon=True)
            self._thread.start()

    @property
    def left(self) -> list[Entry]:
        """Jobs that are not done yet, in their order."""
        with self._changed:
            return [*([self._now] if self._now else []), *self._waiting]

    def withdraw(self, name: str) -> bool:
        """Take a job out again; whether it had not begun."""
        with self._changed:
            found = next((entry for entry in self._waiting if entry.name == name), None)
            if found is None:
                return False
            self._waiting.remove(found)
        found.over()
        return True

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for all jobs, or at most so many seconds; whether none is left. No more may be
        added."""
        if self._thread is None:
            return True
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def give_up(self) -> None:
        """What is left is not done. Of a job that is under way nothing is heard any more."""
        with self._changed:
            self._given_up = self._ending = True
            never, now = list(self._waiting), [self._now] if self._now else []
            self._waiting.clear()
            self._changed.notify_all()
        self.failed += [entry.name for entry in now + never]
        for entry in never:
            entry.over()

    def close(self, seconds: float | None = None) -> None:
        """Wait for all jobs, or at most so many seconds, and give up what is left."""
        self.wait(seconds)
        self.give_up()

    def _next(self) -> Entry | None:
        with self._changed:
            self._now = None
            self._changed.wait_for(lambda: self._waiting or self._ending)
            self._now = self._waiting.popleft() if self._waiting else None
            return self._now

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            try:
                self._attempt(entry)
            except Exception as error:
                if not self._given_up:
                    self.failed.append(entry.name)
                    self._say(f"could not {entry.name}: {first_line(error)}", "warning")
            entry.over()

    def _attempt(self, entry: Entry) -> None:
        if entry.target in self._lost:
            self.failed.append(entry.name)
            return
        pauses = () if entry.target in self._down else self._pauses
        for number, pause in enumerate((*pauses, None), 1):
            try:
                entry.job()
                self._down.discard(entry.target)
                return
            except Hopeless:
                raise
            except Exception as error:
                if pause is None or self._given_up:
                    self._down.add(entry.target)
                    if self._ending:
                        self._lost.add(entry.target)
                    raise
                if number == 1:
                    told = first_line(error)
                    self._say(f"could not {entry.name} yet ({told}); it is tried again")
                self._pause(pause)
                if self._given_up:
                    raise

    def _pause(self, seconds: float) -> None:
        """Sleep, until somebody waits; from then on for a short time."""
        with self._changed:
            if not self._ending:
                self._changed.wait_for(lambda: self._ending, seconds)
            else:
                short = min(seconds, LONGEST_PAUSE_AT_THE_END)
                self._changed.wait_for(lambda: self._given_up, short)

    def _say(self, text: str, level: str = "info") -> None:
        if not self._given_up:
            self._events.message(text, level)
