"""What was live when: the whole course of a simulation, and the course of a deeper model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NONE = np.zeros(0, np.int64)


@frozen
class Step:
    """Where the forward or backward pass of a block begins, if that is told."""

    block: int
    backward: bool
    flops: int  # counted until then


@frozen(kw_only=True, eq=False)
class Curve:
    """Bytes of live tensors by category, from one mark to the next.

    One row for what was live at the start, then one for each new tensor. `steps` divide it into
    parts, of which the first lies before the first step; each but this goes from its step to the
    next one or to the end.
    """

    categories: tuple[str, ...]
    sizes: Ints  # (rows,): bytes of the new tensor; 0 in the first row
    live: Ints  # (rows, categories)
    steps: Sequence[Step] = ()
    starts: Ints = NONE  # (parts,): the first row of each part; the curve's first row is in none
    levels: Ints = NONE  # (parts, categories): what is live right before the first row
    hosts: Ints = NONE  # (parts, 2): bytes on the host when it begins, and at most in it
    turns: Ints = NONE
    """(rows,), or none at all: whose turn comes with a row that stands for no tensor, if blocks are
    to wait on the host. Block n's turn is n + 1 in a forward pass, -n - 1 in a backward one."""

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


def highest(curves: Sequence[Curve]) -> dict[str, int]:
    """Bytes by category at the highest row of all."""
    return max(curves, key=lambda curve: curve.peak).at_peak()


def lowered(curve: Curve, less: Mapping[str, int]) -> Curve:
    """Without so many bytes by category, which are in all of its rows."""
    away = np.array([less.get(name, 0) for name in curve.categories], np.int64)
    return evolve(curve, live=curve.live - away, levels=curve.levels - away)
