"""The order of training: a pure function of (seed, epoch), so any step can be gone to directly.

In each bucket an epoch takes every image as often as `repeats` has whole passes, then, for the
rest, the next images of a fixed seeded cycle through the bucket. The cycle goes on from epoch to
epoch (epoch e takes places e k to (e + 1) k of it), so that no image is taken twice by one epoch's
rest and over time all are seen equally often. Each pass is shuffled for itself, which keeps the
repetitions of an image apart; the bucket is cut into batches, of which the last may be short; the
batches of all buckets are shuffled; and windows of `ranks * accumulate` batches are cut from them,
one per step, the last of an epoch perhaps short. Nothing is dropped and nothing doubled.

Where sources come and go, an epoch is made of the buckets of those that are there; steps and epochs
go on counting.

An epoch's order is computed once, in time and memory proportional to its samples (about 0.2 s for a
million, and 16 bytes each while it is made), and kept (4 bytes each): any step of any epoch costs
the same, whatever came before.
Shuffles sort by raw Philox output, which, unlike numpy's own permutations, is the same in all
versions of numpy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from compiler.data.manifest import Manifest
from compiler.data.stages import stages
from compiler.plan import Plan
from runtime import rng

Rows = NDArray[np.int64]
Held = NDArray[np.uint32]
"""Rows as they are kept."""
_NONE: Held = np.empty(0, np.uint32)
_WORTH = 1 << 16  # samples
_SHARES = 16  # of a pass that are sorted one after the other, so that it takes less memory


@frozen(kw_only=True)
class Group:
    """One bucket: its manifest rows, the samples of an epoch, and the batch size."""

    rows: Rows | Held
    samples: int
    batch_size: int


@frozen(kw_only=True)
class BatchRows:
    """One batch: its bucket's index in the plan, its manifest rows, and the slot of its first
    sample in the window; slots count through all batches of a window."""

    bucket: int
    rows: Rows
    first_slot: int


@frozen(kw_only=True)
class Part:
    """Epochs in which the same groups take part, up to the next part."""

    first_epoch: int
    first_step: int
    groups: tuple[int, ...]  # numbers of groups
    batches: int  # of an epoch
    steps: int


@frozen
class _Epoch:
    rows: Mapping[int, Held]  # by bucket, in order
    bucket: Held  # per batch, in order
    start: Held  # per batch: where it starts in its bucket's rows


class Order:
    """Which samples each step takes."""

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        seed: int,
        window: int,
        starts: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        """`window` is the number of batches in a step: ranks times accumulation. `starts` says,
        from epoch 0 on, from which epoch on which groups take part; without any all do."""
        self.groups = tuple(groups)
        self._seed = seed
        self._window = window
        self._cycles = {
            number: _shuffled(len(group.rows), seed, "cycle", number)
            for number, group in enumerate(groups)
            if group.samples % len(group.rows)
        }
        self.parts = self._parts(starts or [(0, range(len(groups)))])
        self._first_steps = [part.first_step for part in self.parts]
        self._epoch_number = -1
        self._epoch = _Epoch({}, _NONE, _NONE)

    @classmethod
    def of_plan(cls, plan: Plan, manifest: Manifest) -> Order:
        """The order of a plan's run. The manifest must be the plan's."""
        groups = [
            Group(
                rows=np.frombuffer(members.samples, np.uint32),
                samples=bucket.samples,
                batch_size=bucket.batch_size,
            )
            for members, bucket in zip(manifest.buckets, plan.buckets, strict=True)
        ]
        every = stages(plan.steps, plan.sources)
        names = [bucket.source for bucket in plan.buckets]
        starts = [
            (each.first_epoch, [n for n, name in enumerate(names) if name in each.sources])
            for each in every
        ]
        window = plan.steps.ranks * plan.steps.accumulate
        order = cls(groups, seed=plan.seed, window=window, starts=starts)
        counted = [(part.first_step, part.steps, part.batches) for part in order.parts]
        planned = [(each.first_step, each.per_epoch, each.batches_per_epoch) for each in every]
        assert counted == planned, "plan and order count alike"
        return order

    @property
    def batches_per_epoch(self) -> int:
        """Of the first epoch."""
        return self.parts[0].batches

    @property
    def steps_per_epoch(self) -> int:
        """Of the first epoch."""
        return self.parts[0].steps

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) of `step` (from 0)."""
        return self._place(step)[1]

    def _parts(self, starts: Sequence[tuple[int, Sequence[int]]]) -> list[Part]:
        parts: list[Part] = []
        for epoch, numbers in starts:
            before = parts[-1] if parts else None
            chosen = [self.groups[number] for number in numbers]
            batches = sum(-(-group.samples // group.batch_size) for group in chosen)
            parts.append(
                Part(
                    first_epoch=epoch,
                    first_step=before.first_step + (epoch - before.first_epoch) * before.steps
                    if before
                    else 0,
                    groups=tuple(numbers),
                    batches=batches,
                    steps=-(-batches // self._window),
                )
            )
        return parts

    def _place(self, step: int) -> tuple[Part, int, int]:
        """The part of `step`, its epoch, and its place in that epoch."""
        part = self.parts[bisect_right(self._first_steps, step) - 1]
        epoch, place = divmod(step - part.first_step, part.steps)
        return part, part.first_epoch + epoch, place

    def window(self, step: int) -> list[BatchRows]:
        """The batches of `step` (from 0), at least one."""
        part, number, place = self._place(step)
        if number != self._epoch_number:
            self._epoch = _Epoch({}, _NONE, _NONE)  # two at once would take twice the memory
            self._epoch = self._ordered(number, part.groups)
            self._epoch_number = number
        first = place * self._window
        found: list[BatchRows] = []
        slot = 0
        for batch in range(first, min(first + self._window, part.batches)):
            bucket, start = int(self._epoch.bucket[batch]), int(self._epoch.start[batch])
            kept = self._epoch.rows[bucket][start : start + self.groups[bucket].batch_size]
            rows = kept.astype(np.int64)
            found.append(BatchRows(bucket=bucket, rows=rows, first_slot=slot))
            slot += len(rows)
        return found

    def _ordered(self, epoch: int, numbers: Sequence[int]) -> _Epoch:
        rows = {number: self._bucket_rows(number, epoch) for number in numbers}
        groups = [self.groups[number] for number in numbers]
        starts = [np.arange(0, g.samples, g.batch_size, dtype=np.uint32) for g in groups]
        buckets = np.repeat(np.array(numbers, np.uint32), [len(s) for s in starts])
        shuffle = _shuffled(len(buckets), self._seed, "batches", epoch)
        return _Epoch(rows, buckets[shuffle], np.concatenate(starts)[shuffle])

    def _bucket_rows(self, number: int, epoch: int) -> Held:
        """One epoch's rows of one bucket in order, pass by pass."""
        group = self.groups[number]
        images = len(group.rows)
        rest = group.samples % images
        noise = _bits(group.samples, self._seed, "order", epoch, number)
        ordered = np.empty(group.samples, np.uint32)
        for start in range(0, group.samples, images):
            cycle = self._cycles[number] if start + images > group.samples else None
            for order in _sorted(noise[start : start + images]):
                taken = order if cycle is None else cycle[(epoch * rest + order) % images]
                ordered[start : start + len(order)] = group.rows[taken]
                start += len(order)
        return ordered


def _bits(count: int, seed: int, purpose: str, *numbers: int) -> NDArray[np.uint64]:
    bits: NDArray[np.uint64] = rng.generator(seed, purpose, *numbers).bit_generator.random_raw(
        count
    )
    return bits


def _shuffled(count: int, seed: int, purpose: str, *numbers: int) -> Held:
    """A permutation of `count` numbers."""
    shuffled, at = np.empty(count, np.uint32), 0
    for order in _sorted(_bits(count, seed, purpose, *numbers)):
        shuffled[at : at + len(order)] = order
        at += len(order)
    return shuffled


def _sorted(bits: NDArray[np.uint64]) -> Iterator[Rows]:
    """Where the numbers stand that come next in ascending order, equal ones as they stand."""
    shares = _SHARES if len(bits) >= _WORTH else 1
    width = 2**64 // shares
    for least in range(0, 2**64, width):
        where = np.flatnonzero((bits >= np.uint64(least)) & (bits <= np.uint64(least + width - 1)))
        yield where[np.argsort(bits[where], kind="stable")]
