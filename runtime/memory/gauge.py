"""Measures, while a run goes on, what a piece of each of its phases needs.

On the processor, which has no allocator to ask, one piece (a prompt, a picture) runs under the
tracker: the largest that the phase has. On every device it is noted what the piece was, for only
like can be set beside like.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from attrs import field, mutable
from torch import Tensor, nn

from runtime.memory.pieces import tensors_in
from runtime.memory.tracker import Tracker

_LIBRARY = "diffusers.models"
_BARE = frozenset({type(None), bool, int, float, str, dict, OrderedDict, set})  # without tensors


@mutable(kw_only=True)
class Reading:
    """What a piece of a phase needed. `parts` (bytes by category) add up to `peak`."""

    size: float
    on: str = ""  # what the piece was; "" where all are alike
    planned: str = ""  # what the plan counted
    peak: int | None = None  # None where the device's allocator is asked instead
    parts: Mapping[str, int] = field(factory=dict)
    _tracker: Tracker | None = None

    def name(self, existing: Mapping[str, Iterable[Tensor]]) -> None:
        """Say of which categories tensors are."""
        if self._tracker is not None:
            for category, tensors in existing.items():
                self._tracker.register(tensors, category)


@mutable(kw_only=True)
class Met:
    """What a phase did of that which was planned for it, in words. All else that it does may be
    another thing each time, so only the largest is kept."""

    missed: set[str]  # what was planned and not done yet
    largest: str = ""  # of all that was done; "": nothing was
    size: float = 0

    def note(self, piece: str, size: float) -> None:
        """`piece` is done, which is so large."""
        self.missed.discard(piece)
        if size > self.size:
            self.largest, self.size = piece, size


class Gauge:
    """The readings of a run, by phase. Use it in the thread that does the phase's work."""

    def __init__(self, device: torch.device | None) -> None:
        """`device` None: nothing is to be measured."""
        self.readings: dict[str, Reading] = {}
        self.met: dict[str, Met] = {}
        """Of phases whose allocator is asked."""
        self._device = device

    @property
    def asks(self) -> bool:
        """Whether the device has an allocator to ask, which tells of phases and not of pieces."""
        return self._device is not None and self._device.type != "cpu"

    def wants(self, phase: str, size: float = 0) -> bool:
        """Whether a piece of `phase` as large as `size` would be measured. Else nobody asks what
        exists then, which takes a while to gather."""
        last = self.readings.get(phase)
        return self._device is not None and (last is None or last.size < size)

    @contextmanager
    def reading(
        self,
        phase: str,
        size: float = 0,
        existing: Mapping[str, Iterable[Tensor]] | None = None,
        apart: Iterable[Tensor] = (),
        *,
        on_host: bool = False,
    ) -> Iterator[Reading]:
        """Inside, a piece of `phase` is done; it is measured if none of its `size` was before.

        `existing` are the tensors that are there, by category; those `apart` and, if `on_host`,
        all that is made inside belong to the host whatever the device is. Say in the reading what
        the piece was. Nothing is kept of a piece that fails.
        """
        found = Reading(size=size)
        if self._device is None or not self.wants(phase, size):
            yield found
            return
        if self.asks:
            yield found
        else:
            found._tracker = tracker = Tracker({"cpu"})
            found.name(existing or {})
            tracker.exclude(apart)
            tracker.reset_peak()
            with tracker, tracker.elsewhere() if on_host else nullcontext():
                yield found
            found.peak, found.parts, found._tracker = tracker.peak, tracker.breakdown(), None
        self.readings[phase] = found


NO_GAUGE = Gauge(None)
"""Measures nothing, for work that is no run's."""


def lying(*modules: nn.Module) -> dict[str, list[Tensor]]:
    """The tensors of `modules` as the plan's memory names them: weights and buffers, and tables
    that are neither (of places, for attention)."""
    return {
        "activations": [t for each in modules for part in each.modules() for t in _tables(part)],
        "weights": [t for each in modules for t in (*each.parameters(), *each.buffers())],
    }


def _tables(part: object) -> Iterator[Tensor]:
    """Tensors in attributes of `part`, or of an object of the model's library in one of them; not
    what torch keeps of a module in dictionaries of its own."""
    for value in vars(part).values():
        if type(value) in _BARE:  # most are, and a model has a hundred thousand
            continue
        if isinstance(value, Tensor | list | tuple):
            yield from tensors_in(value)
        elif not isinstance(value, nn.Module) and _LIBRARY in type(value).__module__:
            yield from tensors_in(list(vars(value).values()))
