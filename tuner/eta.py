"""How long the rest of a run takes, from its own recent pace."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from compiler.occasions import checkpoint_steps, evaluation_steps, validation_steps
from compiler.plan import Plan

RECENT = 100  # steps: long enough for every bucket to take part, short enough to follow a change


class Eta:
    """Remaining steps at the mean of recent step times, and remaining validations and saves.

    A validation (or save) that has not been seen yet counts nothing until the first one is timed,
    so an early figure may be low; the untrained model's pictures usually are that first one.
    """

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total = plan.steps.total
        self._due = {
            "validate": validation_steps(plan),
            "evaluate": evaluation_steps(plan),
            "save": checkpoint_steps(plan),
        }
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._seen: dict[str, float] = {}  # phase -> seconds that it took last
        self._phase, self._began = "", clock()
        self._step = 0

    def phase(self, name: str) -> None:
        """A phase begins; the one before it has ended."""
        self._end_phase(0.0)
        self._phase, self._began = name, self._clock()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A step has ended; `seconds` is what it took, with all overhead of the loop."""
        seconds = float(metrics.get("seconds", 0.0))
        self._end_phase(seconds)
        self._phase, self._step = "train", int(metrics["step"])
        self._steps.append(seconds)

    @property
    def step_seconds(self) -> float | None:
        """Mean time of the recent steps; None before the first."""
        return fmean(self._steps) if self._steps else None

    def seconds_left(self) -> float | None:
        """Seconds to the end of the run; None before the first step."""
        if self.step_seconds is None:
            return None
        rest = (self._total - self._step) * self.step_seconds
        for name, due in self._due.items():
            # What is due after this very step has not begun when the step is told of.
            coming = len(due) - bisect_left(due, self._step)
            rest += coming * self._seen.get(name, 0.0)
        return rest

    def _end_phase(self, after: float) -> None:
        """Note how long the phase took that ended `after` seconds ago."""
        if self._phase in self._due:
            self._seen[self._phase] = max(0.0, self._clock() - self._began - after)


class Countdown:
    """What is left of one phase that counts, at the pace since its first word: what had been done
    before (what lay in the cache, say) took no time and tells nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin(0)

    def begin(self, total: int) -> None:
        """A phase of `total` units begins; 0: unknown."""
        self._total, self._done = total, 0
        self._first: tuple[int, float] | None = None

    def advance(self, done: int) -> None:
        """So many units are complete."""
        self._done = done
        if self._first is None:
            self._first = done, self._clock()

    def seconds_left(self) -> float | None:
        """Seconds to the end of the phase; None before anything was done in it."""
        if self._first is None or not self._total or self._done <= self._first[0]:
            return None
        each = (self._clock() - self._first[1]) / (self._done - self._first[0])
        return max(0, self._total - self._done) * each
