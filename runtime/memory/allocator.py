"""The device's own allocator in a tracker's place: what a step really takes there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

import numpy as np
import torch
from torch import Tensor

from runtime.memory.curve import Curve

ALLOCATED = "allocated"  # the one category that an allocator knows


class AllocatorTracker:
    """Has what `runtime.memory.step` needs of a `Tracker`, on a CUDA device and real tensors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.category = ""
        self.reserved: dict[int, int] = {}
        """By the bytes that were read (live, or at the peak): what the allocator had taken from the
        device at most, which includes what it keeps for later."""
        self.host = 0  # allocators know nothing of the host
        self.host_peak = 0

    def __enter__(self) -> Self:
        torch.cuda.synchronize(self.device)
        self.reset_peak()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize(self.device)

    @property
    def current(self) -> int:
        """Bytes of live tensors, as the allocator hands them out."""
        return torch.cuda.memory_allocated(self.device)

    @property
    def peak(self) -> int:
        """The most of them since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        """Forget the past."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def categories(self) -> dict[str, int]:
        """What is live now."""
        return {ALLOCATED: self._read(self.current)}

    def breakdown(self) -> dict[str, int]:
        """What was live at the peak."""
        return {ALLOCATED: self._read(self.peak)}

    def curves(self) -> list[Curve]:
        """The peak, as a course of one point."""
        live = np.array([[self._read(self.peak)]])
        return [Curve(categories=(ALLOCATED,), sizes=np.zeros(1, np.int64), live=live)]

    def _read(self, nbytes: int) -> int:
        self.reserved[nbytes] = torch.cuda.max_memory_reserved(self.device)
        return nbytes

    def register(self, tensors: Iterable[Tensor], category: str) -> None:
        """Allocators know no names."""

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """What is on the host is not on the device anyway."""

    def workspace(self, nbytes: int, category: str = "workspace") -> None:
        """What something takes inside is counted where it is taken."""

    def mark(self) -> None:
        """One point tells of no course."""

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made on the host is not on the device anyway."""
        yield
