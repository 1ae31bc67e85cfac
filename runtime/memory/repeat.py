"""The course of a deep model, put together from the parts of a shallow one's.

In equal blocks at like places the same tensors are made, kept and freed, so what a block's pass
adds to what is live is the same at each of them. The deep model's course is that of the shallow one
with the parts of some blocks several times: to the byte, and row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import frozen

from runtime.memory.curve import NONE, Curve, Ints, NotAlike


@frozen(kw_only=True)
class Run:
    """Equal blocks that follow each other, by their numbers in the shallow model."""

    kinds: Mapping[int, object]
    """Block -> its kind, in the model's order. Those of one kind have to be alike."""
    order: tuple[int, ...]  # which of them stands for each of the deep model's


@frozen(kw_only=True)
class More:
    """What the deep model has more than the shallow one at one moment of their courses."""

    live: Mapping[str, int]  # bytes on the device by category
    host: int  # bytes on the host
    flops: int = 0  # counted until then


def repeated(curves: Sequence[Curve], runs: Sequence[Run], more: More) -> tuple[list[Curve], More]:
    """The courses of the deep model, from the shallow one's that follow each other, and what it has
    more at their end; given what it has `more` when they begin.

    Raises NotAlike where blocks of one kind differ, or their passes are not told apart.
    """
    found = []
    for curve in curves:
        walk = _Walk(curve, more)
        walk.go(runs)
        found.append(walk.curve())
        more = walk.more()
    return found, more


class _Walk:
    """Through the parts of one curve. Bytes by category, on the host, and operations counted are
    one vector here."""

    def __init__(self, curve: Curve, more: More) -> None:
        names = curve.categories
        if any(nbytes for name, nbytes in more.live.items() if name not in names):
            raise NotAlike("other categories")
        self._of, self._count = curve, len(names)
        self._ends = [*map(int, curve.starts[1:]), len(curve.sizes)]
        flops = [step.flops for step in curve.steps]
        before = flops[0] if flops else 0
        self._levels = np.column_stack([curve.levels, curve.hosts[:, 0], [before, *flops]])
        live = [more.live.get(name, 0) for name in names]
        self._offset = np.array([*live, more.host, more.flops])
        self._sizes = [curve.sizes[:1]]
        self._rows = [curve.live[:1] + self._offset[: self._count]]
        self._turns = [curve.turns[:1]]
        self._most: list[int] = []  # bytes on the host
        self._level = self._levels[0] + self._offset  # the deep model's where the next part begins

    def go(self, runs: Sequence[Run]) -> None:
        """To the curve's end."""
        run_of = {block: run for run in runs for block in run.kinds}
        part, steps = 0, self._of.steps
        while part <= len(steps):
            block = steps[part - 1].block if part else -1
            further = sum(len(r.order) - len(r.kinds) for r in runs if max(r.kinds) < block)
            run = run_of.get(block)
            parts = range(part, part + (len(run.kinds) if run else 1))
            if run is None:
                self._add(part, further)
            else:
                self._repeat(run, parts, min(run.kinds) + further)
            part = parts.stop

    def curve(self) -> Curve:
        """The deep model's."""
        most = max(self._most)
        return Curve(
            categories=self._of.categories,
            sizes=np.concatenate(self._sizes),
            live=np.concatenate(self._rows),
            hosts=np.array([[most, most]]),
            turns=np.concatenate(self._turns) if self._of.turns.size else NONE,
        )

    def more(self) -> More:
        """At the end."""
        *live, host, flops = map(int, self._offset)
        named = dict(zip(self._of.categories, live, strict=True))
        return More(live=named, host=host, flops=flops)

    def _repeat(self, run: Run, parts: range, first: int) -> None:
        """One pass over all blocks of `run`, each of which has one of the shallow one's `parts`; in
        the deep one, `first` is the number of the first."""
        steps = self._of.steps[parts.start - 1 : parts.stop - 1]
        backward = steps[0].backward
        numbers = tuple(step.block for step in steps)
        blocks, order = tuple(run.kinds), tuple(enumerate(run.order, first))
        if backward:
            blocks, order = blocks[::-1], order[::-1]
        if numbers != blocks or any(step.backward != backward for step in steps):
            raise NotAlike("blocks are run in another order")
        if order[-1][1] != numbers[-1] or run.order.count(numbers[-1]) > 1:
            raise NotAlike("where the last block's pass ends is not known")
        self._compare([run.kinds[number] for number in numbers], parts)
        part_of = dict(zip(numbers, parts, strict=True))
        for deep, number in order:
            self._add(part_of[number], deep - number)

    def _compare(self, kinds: Sequence[object], parts: range) -> None:
        first: dict[object, int] = {}
        for kind, part in zip(kinds[:-1], parts[:-1], strict=True):
            like = first.setdefault(kind, part)
            if like != part and not self._alike(like, part):
                raise NotAlike("equal blocks' passes differ")

    def _alike(self, one: int, other: int) -> bool:
        sizes = [self._of.sizes[self._slice(part)] for part in (one, other)]
        turns = [self._turns_from(self._of.steps[p - 1].block, p) for p in (one, other)]
        rows = [self._of.live[self._slice(p)] - self._of.levels[p] for p in (one, other)]
        grown = [self._levels[part + 1] - self._levels[part] for part in (one, other)]
        return all(np.array_equal(*pair) for pair in (sizes, turns, rows, grown))

    def _slice(self, part: int) -> slice:
        return slice(int(self._of.starts[part]), self._ends[part])

    def _turns_from(self, number: int, part: int) -> Ints:
        """Those in a part, with blocks' numbers counted from this one."""
        turns = self._of.turns[self._slice(part)]
        found: Ints = turns - number * np.sign(turns)
        return found

    def _add(self, part: int, further: int) -> None:
        """A part of the shallow course, where the deep one has come to; its blocks have numbers
        there that are so much larger."""
        rows, level = self._slice(part), self._levels[part]
        self._offset = self._level - level
        self._sizes.append(self._of.sizes[rows])
        self._rows.append(self._of.live[rows] + self._offset[: self._count])
        self._turns.append(self._turns_from(-further, part))
        self._most.append(int(self._of.hosts[part, 1] + self._offset[-2]))
        if part + 1 < len(self._levels):
            self._level = self._levels[part + 1] + self._offset
