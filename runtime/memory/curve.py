"""What was live when: the whole course of a simulation, and the course of a deeper model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@frozen(kw_only=True, eq=False)
class Curve:
    """Bytes of live tensors by category, from one mark to the next.

    One row for what was live at the start, then one for each new tensor.
    """

    categories: tuple[str, ...]
    sizes: Ints  # (rows,): bytes of the new tensor; 0 in the first row
    live: Ints  # (rows, categories)

    @property
    def peak(self) -> int:
        """Bytes at the highest row."""
        return int(self.live.sum(axis=1).max())

    def at_peak(self) -> dict[str, int]:
        """Bytes by category at the (first) highest row; categories without any are left out."""
        row = self.live[int(self.live.sum(axis=1).argmax())]
        return {name: int(n) for name, n in zip(self.categories, row, strict=True) if n}


class NotAlike(Exception):
    """Two courses differ by more than repetition."""


def deeper(base: Curve, longer: Sequence[tuple[Curve, int]]) -> Curve:
    """The rows of a deeper model's course among which its peak is, from two and more shallow ones.

    Each of `longer` is the course of a model with one period of blocks more than `base`, in one of
    its runs of equal blocks, and how many periods more than `base` the deep model has in that run.

    In equal blocks the same tensors are made in the same order, and what is live at one place in
    them is an affine function of the number of the block and of the depth. So, for each place, the
    most is in the first or in the last period, and either of them moves by the same bytes with
    every period more. The first half of `base` (to the middle of its periods) lies at the beginning
    of the longer course, the second at its end. Raises NotAlike where that is not so.
    """
    live = base.live.copy()
    for curve, periods in longer:
        if curve.categories != base.categories:
            raise NotAlike("other categories")
        live += periods * (_aligned(base, curve) - base.live)
    return Curve(categories=base.categories, sizes=base.sizes, live=live)


def _aligned(base: Curve, longer: Curve) -> Ints:
    """The rows of `longer` that stand at the places of those of `base`."""
    rows, more = len(base.sizes), len(longer.sizes) - len(base.sizes)
    if more < 0:
        raise NotAlike("a longer model makes fewer tensors")
    front = _equal(base.sizes, longer.sizes[:rows])
    back = _equal(base.sizes[::-1], longer.sizes[::-1][:rows])
    if front + back < rows:
        raise NotAlike("the tensors of equal blocks differ")
    middle = (front + rows - back) // 2
    aligned: Ints = np.concatenate([longer.live[:middle], longer.live[middle + more :]])
    return aligned


def _equal(one: Ints, other: Ints) -> int:
    """How many of the first entries are equal."""
    differ = np.flatnonzero(one != other)
    return int(differ[0]) if len(differ) else len(one)


def highest(curves: Sequence[Curve]) -> dict[str, int]:
    """Bytes by category at the highest row of all."""
    return max(curves, key=lambda curve: curve.peak).at_peak()


def affine(
    base: Mapping[str, int], longer: Sequence[tuple[Mapping[str, int], int]]
) -> dict[str, int]:
    """Sums of bytes that grow by the same number with every period."""
    names = dict.fromkeys([*base, *(name for each, _ in longer for name in each)])
    return {
        name: base.get(name, 0)
        + sum(periods * (each.get(name, 0) - base.get(name, 0)) for each, periods in longer)
        for name in names
    }
