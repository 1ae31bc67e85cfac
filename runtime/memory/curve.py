"""What was live when: the whole course of a simulation, and the course of a deeper model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

Ints = NDArray[np.int64]
MOST_PLACES = (
    64  # in which a longer course may have more rows: a UNet's transformers, several times
)


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


def deeper(base: Curve, longer: Sequence[tuple[Curve, int]], together: bool = False) -> Curve:
    """The rows of a deeper model's course among which its peak is, from two and more shallow ones.

    Each of `longer` is the course of a model with one period of blocks more than `base`, in one of
    its runs of equal blocks, and how many periods more than `base` the deep model has in that run.

    In equal blocks the same tensors are made in the same order, and what is live at one place in
    them is an affine function of the number of the block and of the depth. So, for each place, the
    most is in the first or in the last period, and either of them moves by the same bytes with
    every period more. The first half of `base` (to the middle of its periods) lies at the beginning
    of the longer course, the second at its end; and so on in turn, where several runs grow
    `together`. Raises NotAlike where that is not so.
    """
    live = base.live.copy()
    for curve, periods in longer:
        if curve.categories != base.categories:
            raise NotAlike("other categories")
        live += periods * (_aligned(base, curve, together) - base.live)
    return Curve(categories=base.categories, sizes=base.sizes, live=live)


def _aligned(base: Curve, longer: Curve, together: bool) -> Ints:
    """The rows of `longer` that stand at the places of those of `base`."""
    more = len(longer.sizes) - len(base.sizes)
    if more < 0:
        raise NotAlike("a longer model makes fewer tensors")
    for places in range(1, MOST_PLACES + 1 if together else 2):
        if more % places:
            continue
        rows = _rows(base.sizes, longer.sizes, more // places)
        if rows is not None:
            return longer.live[rows]
    raise NotAlike("the tensors of equal blocks differ")


def _rows(base: Ints, longer: Ints, more: int) -> Ints | None:
    """For each row of `base` that row of `longer` which is at its place, if `longer` has `more`
    rows more in each of its runs of equal blocks; None if that can't be.

    The further rows are taken to lie in the middle of where they can lie.
    """
    found = np.arange(len(base))
    start, shift = 0, 0
    while True:
        end = start + _equal(base[start:], longer[start + shift :])
        if end == len(base) and end + shift == len(longer):
            return found
        there = longer[: end + shift + more]
        same = _equal(base[start:end][::-1], there[::-1]) if more else 0
        if len(there) < end + shift + more or not same:
            return None
        start, shift = end - (same + 1) // 2, shift + more
        found[start:] += more


def _equal(one: Ints, other: Ints) -> int:
    """How many of the first entries are equal."""
    common = min(len(one), len(other))
    differ = np.flatnonzero(one[:common] != other[:common])
    return int(differ[0]) if len(differ) else common


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
