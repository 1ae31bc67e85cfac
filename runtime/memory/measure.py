"""Measures what a piece of a run really allocates, to be set beside what was planned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

import torch
from attrs import frozen
from torch import Tensor

from runtime.memory.tracker import Tracker

T = TypeVar("T")
Mark = Callable[[Iterable[Tensor], str], None]


@frozen(kw_only=True)
class Measured(Generic[T]):
    """What a function returned, and the most bytes of tensors that were live while it ran.

    `parts` adds up to `peak`. On an accelerator, whose allocator knows no categories, it is what
    was there before ("resident") and what came on top ("step").
    """

    result: T
    peak: int
    parts: Mapping[str, int]


def measure(
    run: Callable[[Mark], T], device: torch.device, existing: Mapping[str, Iterable[Tensor]]
) -> Measured[T]:
    """Run `run` and measure its peak on `device`.

    `existing` are the tensors that are there before, by category ("weights", "optimizer"). `run`
    is given a function that names live tensors; call it with the gradients before they are
    dropped. On the CPU every operation passes the tracker, which takes some microseconds; measure
    a single step. Raises ValueError for a device that can't be measured.
    """
    if device.type == "cpu":
        return _on_cpu(run, existing)
    if device.type == "cuda":
        return _on_cuda(run, device)
    raise ValueError(f"peak memory can't be measured on {device.type}")


def _on_cpu(run: Callable[[Mark], T], existing: Mapping[str, Iterable[Tensor]]) -> Measured[T]:
    tracker = Tracker({"cpu"})
    for category, tensors in existing.items():
        tracker.register(tensors, category)
    tracker.reset_peak()
    with tracker:
        result = run(tracker.register)
    return Measured(result=result, peak=tracker.peak, parts=tracker.breakdown())


def _on_cuda(run: Callable[[Mark], T], device: torch.device) -> Measured[T]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run(lambda tensors, category: None)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    parts = {"resident": before, "step": peak - before}
    return Measured(result=result, peak=peak, parts=parts)
