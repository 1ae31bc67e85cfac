"""Time and device memory of a run's phases, measured as they pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from runtime.memory.gauge import Gauge

PHASE = "phase_of_run"  # attribute of an exception: the innermost phase that it ended


def failed_in(error: BaseException) -> str:
    """The innermost phase that `error` ended; "" if it ended none."""
    return str(getattr(error, PHASE, ""))


class Clock:
    """Seconds per phase, and the allocator's peak where the device has one (CUDA).

    `gauge` measures pieces of the phases where it has none.

    Phases may be nested; each moment belongs to the innermost one.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.gauge = Gauge(device)
        self._device = device
        self._stack: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside is booked under `name`."""
        self._book()
        self._stack.append(name)
        try:
            yield
        except BaseException as error:
            if not failed_in(error):
                setattr(error, PHASE, name)
            raise
        finally:
            self._book()
            self._stack.pop()

    def _book(self) -> None:
        """Book what has passed since the last change of phase."""
        now = time.perf_counter()
        if self._stack:
            name = self._stack[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            if self._device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self._device)
                self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._since = now
