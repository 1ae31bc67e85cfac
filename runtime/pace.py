"""Notices when a run goes slower than it should, and says each reason once.

A stall: a step that takes `STALL` times the median of those before it. Waiting: over the last
`RECENT` readings most of the time went into waiting for data. A spill: nearly all of the device's
memory is taken and steps take `SPILL` times the median; where the driver moves what does not fit
into system memory (Windows, WDDM) there is no error, only this.

Times are not part of what a run must repeat, so nothing of this stands in the metrics.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import TypeVar

import torch

from runtime.events import Events

STALL = 10.0
SPILL = 2.0
FULL = 0.97  # share of the device's memory from which on it is nearly all taken
LEAST = 20  # readings before anything is judged
RECENT = 20  # readings that waiting is judged over, and in a row that are slow in a spill
SPILLING = 3
WAITING = 0.5  # share of the time
NOTICED_SECONDS = 0.05  # a step; below, nobody minds

T = TypeVar("T")
Used = Callable[[], float]  # share of the device's memory that is taken, by whomever


class Pace:
    """Seconds of each step, and how many of them were spent waiting for data."""

    def __init__(self, events: Events, used: Used | None = None) -> None:
        """`used` is asked only when steps are slow; None: the device does not tell."""
        self._events, self._used = events, used
        self._steps: deque[float] = deque(maxlen=128)  # seconds a step, reading by reading
        self._waits: deque[tuple[float, float]] = deque(maxlen=RECENT)  # (waited, whole)
        self._waited = 0.0
        self._slow = 0  # readings in a row
        self._said: set[str] = set()

    def waited(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, with the time that they are waited for taken down."""
        source = iter(items)
        while True:
            began = time.perf_counter()
            try:
                items = [next(source)]
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            yield items.pop()  # kept by who gets it alone, and gone when they let go of it

    def read(self, step: int, seconds: float, steps: int = 1) -> None:
        """`steps` steps up to `step` took `seconds` each."""
        waited, self._waited = self._waited / steps, 0.0
        usual = median(self._steps) if len(self._steps) >= LEAST else None
        self._steps.append(seconds)
        self._waits.append((waited, seconds))
        if usual is None:
            return
        self._judge_memory(step, seconds, usual)
        if seconds >= STALL * usual and seconds >= NOTICED_SECONDS:
            reason = f", {waited:.1f} s of it waiting for data" if waited > seconds / 2 else ""
            self._say(
                "stall",
                f"step {step} took {seconds:.1f} s{reason}; the median is {usual:.2g} s. Later "
                "ones are not told of: the report draws them",
            )
        self._judge_waiting(step)

    def _judge_memory(self, step: int, seconds: float, usual: float) -> None:
        self._slow = self._slow + 1 if seconds >= SPILL * usual else 0
        if self._slow < SPILLING or self._used is None or "spill" in self._said:
            return
        share = self._used()
        if share >= FULL:
            self._say(
                "spill",
                f"at step {step} a step takes {seconds / usual:.1f} times as long as before and "
                f"{share:.0%} of the device's memory is taken: the driver may be moving some of it "
                "to system memory. Close what else uses the device, or set a smaller memory.budget",
            )

    def _judge_waiting(self, step: int) -> None:
        waited = sum(wait for wait, _ in self._waits)
        whole = sum(seconds for _, seconds in self._waits)
        count = len(self._waits)
        if count == RECENT and waited > WAITING * whole and waited / count >= NOTICED_SECONDS:
            self._say(
                "waiting",
                f"up to step {step} the device waited for data {waited / whole:.0%} of the time "
                f"({waited / count:.2f} s a step): the disk of the cache is too slow for it",
            )

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._events.message(text, "warning")


def used_of(device: torch.device) -> Used | None:
    """What tells how full `device` is; None where nothing does."""
    if device.type != "cuda":
        return None

    def used() -> float:
        free, total = torch.cuda.mem_get_info(device)
        # Under WDDM what is reserved may exceed what the device has.
        return max(1 - free / total, torch.cuda.memory_reserved(device) / total)

    return used
