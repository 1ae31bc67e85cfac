"""Counts the bytes of live tensors, the same on real and on meta tensors.

Under a `Tracker` every operation's outputs are looked at; a storage that is new enters the table,
one that is freed leaves it. What a kernel allocates inside itself is not seen (see `workspace`),
and neither is what exists before (see `register`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from attrs import frozen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from runtime.memory.curve import NONE, Curve, Step
from runtime.memory.rounding import rounded

SEVERAL = (tuple, list)  # as a union it would be made anew in each of many calls
META = torch.device("meta")
RESIZE = torch.ops.inductor.resize_storage_bytes_.default  # gives memory back, or takes it


class Kernels(Protocol):
    """Runs an operation; `runtime.memory.meta` has a quick one for meta tensors."""

    fresh: int | None
    """Bytes of the last result's storage, where that is one tensor on the device that is certain
    to be new; else None."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The operation's result."""
        ...


class _Block:
    """One storage's time in the table; `died` -1: it is live."""

    __slots__ = ("born", "category", "died", "nbytes", "ref")

    def __init__(self, nbytes: int, category: str, born: int):
        self.nbytes = nbytes
        self.category = category
        self.born = born
        self.died = -1
        self.ref: weakref.ref[Any] | None = None


@frozen
class _Moment:
    """When something was: on the clock, and after how many changes of what is on the host."""

    clock: int
    hosts: int


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Current and peak bytes of tensors on `devices` (device types), by category.

    New storages get the category that `category` holds at the time; `register` renames them later,
    as a gradient is only known to be one when it has arrived. Not for use in several threads.
    """

    def __init__(
        self,
        devices: Collection[str],
        kernels: Kernels | None = None,
        workspaces: Mapping[Any, Callable[..., int]] | None = None,
    ):
        """`workspaces` gives, by operation, what its kernel allocates inside (see `workspace`)."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.devices = frozenset(devices)
        self.kernels = kernels
        self.workspaces = workspaces or {}
        self._inside = {id(operation) for operation in self.workspaces}  # hashing one is slow
        self.category = "activations"
        self.current = 0
        self.peak = 0
        self._clock = 0  # counts births and deaths
        self._peak_at = 0
        self._live: dict[int, _Block] = {}
        self._all: list[_Block] = []
        self._elsewhere: dict[int, tuple[weakref.ref[Any], int]] = {}  # see `exclude`
        self._outside = False
        self._held: list[_Block] = []
        self.host = 0  # bytes that were left out, now
        self.host_peak = 0
        self._hosts = [0]  # all that `host` was
        self._marks = [self._now()]
        self._steps: list[list[tuple[_Moment, Step]]] = [[]]  # after each mark
        self._turns: list[tuple[int, int]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled; the guard around each call would cost a fifth

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and look at what it returned."""
        kwargs = kwargs or {}
        kernels = self.kernels
        if kernels is not None and func.is_view and args:
            out = func(*args, **kwargs)
            if args[0].untyped_storage()._cdata not in self._live:
                self._see_all((out,))
            return out
        out = func(*args, **kwargs) if kernels is None else kernels(func, args, kwargs)
        if kernels is not None and kernels.fresh is not None and not self._outside:
            self._new(out.untyped_storage(), rounded(kernels.fresh), self.category)
        elif isinstance(out, Tensor):
            self._see(out)
        elif isinstance(out, SEVERAL):
            self._see_all(out)
        elif func is RESIZE:
            self._see(args[0])
        if id(func) in self._inside:
            self.workspace(self.workspaces[func](*args, **kwargs))
        return out

    def register(self, tensors: Iterable[Tensor], category: str) -> None:
        """Enter storages that exist already, or rename those in the table."""
        for tensor in tensors:
            block = self._see(tensor)
            if block is not None:
                block.category = category

    def made(self, forms: Iterable[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
        """Tensors on "meta" of these shapes and types, entered all together: to look at how each
        is made takes longer than to make it."""
        with _disable_current_modes():
            tensors = [torch.empty(shape, dtype=dtype, device=META) for shape, dtype in forms]
            for tensor in tensors:
                self._see(tensor)
        return tensors

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Leave storages out that stand for tensors on the host, from now to their end."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._live:
                self._drop(key)
            if key not in self._elsewhere:
                nbytes = rounded(storage.nbytes())
                self._elsewhere[key] = weakref.ref(storage, partial(self._forget, key)), nbytes
                self._host(nbytes)

    def _forget(self, key: int, _: Any) -> None:
        self._host(-self._elsewhere.pop(key)[1])

    def _host(self, nbytes: int) -> None:
        self.host += nbytes
        self.host_peak = max(self.host_peak, self.host)
        self._hosts.append(self.host)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Inside, new storages stand for tensors on the host."""
        before, self._outside = self._outside, True
        try:
            yield
        finally:
            self._outside = before

    def hold(self, nbytes: int, category: str) -> None:
        """Count `nbytes` from now on for ever."""
        self._held.append(self._enter(nbytes, category))

    def workspace(self, nbytes: int, category: str = "workspace") -> None:
        """Count what a kernel allocates inside and frees before it returns."""
        block = self._enter(rounded(nbytes), category)
        self._leave(block)

    def reset_peak(self) -> None:
        """Forget the past: the peak is what is live now."""
        self._all = [*self._live.values(), *self._held]
        self.peak, self._peak_at = self.current, self._clock
        self.host_peak = self.host
        self._hosts = [self.host]
        self._marks, self._steps, self._turns = [self._now()], [[]], []

    def mark(self) -> None:
        """The end of one curve and the start of the next; see `curves`."""
        self._marks.append(self._now())
        self._steps.append([])

    @property
    def curve(self) -> int:
        """The number of the curve that goes on now; see `curves`."""
        return len(self._marks) - 1

    def step(self, block: int, backward: bool, flops: int) -> None:
        """A block's pass begins, `flops` operations after the simulation did; see `Curve.steps`."""
        self._steps[-1].append((self._now(), Step(block, backward, flops)))

    def turn(self, block: int, backward: bool) -> None:
        """A block is needed; see `Curve.turns`."""
        self._clock += 1
        self._turns.append((self._clock, -block - 1 if backward else block + 1))

    def _now(self) -> _Moment:
        return _Moment(self._clock, len(self._hosts))

    def curves(self) -> list[Curve]:
        """What was live from each mark to the next, since `reset_peak`, and from the last one on.

        By the categories that tensors have in the end.
        """
        names = tuple(sorted({block.category for block in self._all}))
        number = {name: index for index, name in enumerate(names)}
        origin = self._marks[0].clock
        change = np.zeros((self._clock - origin + 2, len(names)), np.int64)
        sizes = np.zeros(len(change), np.int64)
        for block in self._all:
            column, born = number[block.category], max(block.born - origin, 0)
            change[born, column] += block.nbytes
            if born:
                sizes[born] = block.nbytes
            if block.died >= 0:
                change[max(block.died - origin, 0), column] -= block.nbytes
        turns = np.zeros(len(change), np.int64)
        for clock, turn in self._turns:
            turns[clock - origin] = turn
        live = change.cumsum(axis=0)
        found = []
        for (mark, end), steps in zip(
            pairwise([*self._marks, self._now()]), self._steps, strict=True
        ):
            first, last = mark.clock - origin, end.clock - origin
            within = slice(first + 1, last + 1)
            rows = np.flatnonzero(sizes[within] + np.abs(turns[within])) + first + 1
            moments = [mark, *(moment for moment, _ in steps), end]
            clocks = [moment.clock - origin for moment in moments[:-1]]
            starts = np.searchsorted(rows, clocks, side="right")
            hosts = [self._hosts[a.hosts - 1 : b.hosts] for a, b in pairwise(moments)]
            found.append(
                Curve(
                    categories=names,
                    sizes=np.concatenate([[0], sizes[rows]]),
                    live=np.concatenate([live[first : first + 1], live[rows]]),
                    steps=tuple(step for _, step in steps),
                    starts=1 + starts,
                    levels=live[np.append(rows - 1, last)[starts]],
                    hosts=np.array([(each[0], max(each)) for each in hosts]),
                    turns=np.concatenate([[0], turns[rows]]) if self._turns else NONE,
                )
            )
        return found

    def held(self, tensors: Iterable[Tensor]) -> dict[str, int]:
        """Bytes by category now of what `tensors` lie in."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors}
        return _sums(self._live[key] for key in keys if key in self._live)

    def categories(self) -> dict[str, int]:
        """Bytes by category now; they add up to `current`."""
        return _sums(self._live.values())

    def breakdown(self) -> dict[str, int]:
        """Bytes by category when the peak was reached; they add up to `peak`."""
        at = self._peak_at
        parts = _sums(b for b in self._all if b.born <= at and (b.died < 0 or b.died > at))
        assert sum(parts.values()) == self.peak, "every byte at the peak has one category"
        return parts

    def _see_all(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._see(value)
            elif isinstance(value, SEVERAL):
                self._see_all(value)

    def _see(self, tensor: Tensor) -> _Block | None:
        if tensor.device.type not in self.devices:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        block = self._live.get(key)
        if block is None and (self._outside or key in self._elsewhere):
            self.exclude([tensor])
            return None
        nbytes = rounded(storage.nbytes())
        if block is not None:
            if block.nbytes == nbytes:
                return block
            self._drop(key)  # resized: counts as a new one
        return self._new(storage, nbytes, block.category if block else self.category)

    def _new(self, storage: Any, nbytes: int, category: str) -> _Block:
        key = storage._cdata
        block = self._live[key] = self._enter(nbytes, category)
        block.ref = weakref.ref(storage, lambda _: self._drop(key))
        return block

    def _enter(self, nbytes: int, category: str) -> _Block:
        self._clock += 1
        block = _Block(nbytes, category, self._clock)
        self._all.append(block)
        self.current += nbytes
        if self.current > self.peak:
            self.peak, self._peak_at = self.current, self._clock
        return block

    def _drop(self, key: int) -> None:
        block = self._live.pop(key)
        block.ref = None
        self._leave(block)

    def _leave(self, block: _Block) -> None:
        self._clock += 1
        block.died = self._clock
        self.current -= block.nbytes


def _sums(blocks: Iterable[_Block]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for block in blocks:
        parts[block.category] = parts.get(block.category, 0) + block.nbytes
    return parts
