"""The course of a model of which some blocks wait on the host, from that of one where none does.

That they wait changes nothing but when their weights are there. So a model is run whose weights
stay, and which only tells when each of its blocks would be needed; what comes and goes then follows
by the rule that the runtime itself goes by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from attrs import evolve
from torch import nn

from runtime.memory.curve import Curve, Ints
from runtime.memory.rounding import rounded
from runtime.memory.shares import Weights
from runtime.memory.tracker import Tracker
from runtime.offload.blocks import Blocks, in_backward, moves
from runtime.offload.host import packed


class Rehearsal(Blocks):
    """Blocks that tell `tracker` when each of them is needed, and do not wait."""

    def __init__(self, blocks: Sequence[nn.Module], tracker: Tracker) -> None:
        self._tracker = tracker
        for number, block in enumerate(blocks):
            self._wrap(number, block)

    def need(self, number: int) -> None:
        """See `Curve.turns`."""
        self._tracker.turn(number, in_backward())


class Waiting:
    """Which of the blocks that wait are on the device: none at first."""

    def __init__(self, blocks: Mapping[int, Weights]) -> None:
        """`blocks` that wait, by their numbers and in their order."""
        self._numbers = {number: place for place, number in enumerate(blocks)}
        self._weights = list(blocks.values())
        self._here: set[int] = set()
        self._alike = {id(weights): weights for weights in self._weights}  # most blocks are
        sums = {key: _sums(weights) for key, weights in self._alike.items()}
        hosts = {key: _on_host(weights) for key, weights in self._alike.items()}
        self._sums = [sums[id(weights)] for weights in self._weights]
        self.total = sum(hosts[id(weights)] for weights in self._weights)
        """Bytes that wait on the host, which they never leave."""

    @property
    def away(self) -> Counter[str]:
        """Bytes by category that are not on the device now."""
        found: Counter[str] = Counter()
        for place, sums in enumerate(self._sums):
            if place not in self._here:
                found.update(sums)
        return found

    def settle(self) -> None:
        """See `Blocks.settle`."""
        self._here = {0}

    def left_by(self, curves: Sequence[Curve]) -> None:
        """What is here after passes of which each block has its turns in `curves`: the last one
        alone tells. (A block that gets no gradients has none in the backward pass.)"""
        turns = (int(turn) for curve in reversed(curves) for turn in curve.turns[::-1] if turn)
        for turn in turns:
            place = self._numbers.get(abs(turn) - 1)
            if place is not None:
                _, coming = moves(self._here, place, turn < 0, len(self._weights))
                self._here = {place} if coming is None else {place, coming}
                return

    def follow(self, curves: Sequence[Curve]) -> list[Curve]:
        """Curves of the model whose blocks tell their turns and do not wait, which follow each
        other: those of the one whose blocks wait."""
        return [self._followed(curve) for curve in curves]

    def lower(self, curve: Curve) -> Curve:
        """One in which no block has its turn."""
        return evolve(curve, live=curve.live - self._vector(curve.categories))

    def _vector(self, names: Sequence[str]) -> Ints:
        """(categories,): what is away."""
        away = self.away
        return np.array([away[name] for name in names], np.int64)

    def _followed(self, curve: Curve) -> Curve:
        """In place of each turn, a row for each weight that comes with it."""
        sizes: list[Ints] = []
        live: list[Ints] = []
        names, start = curve.categories, 0
        known = {key: _rows(weights, names) for key, weights in self._alike.items()}
        arriving = [known[id(weights)] for weights in self._weights]
        offset = -self._vector(names)

        def add(end: int) -> None:
            nonlocal start
            sizes.append(curve.sizes[start:end])
            live.append(curve.live[start:end] + offset)
            start = end + 1

        def come(place: int) -> None:
            nonlocal offset
            if place not in self._here:
                self._here.add(place)
                sizes.append(arriving[place].sum(axis=1))
                live.append(arriving[place].cumsum(axis=0) + curve.live[row] + offset)
                offset = offset + arriving[place].sum(axis=0)

        for row in np.flatnonzero(curve.turns):
            add(int(row))
            turn = int(curve.turns[row])
            place = self._numbers.get(abs(turn) - 1)
            if place is None:
                continue
            come(place)
            gone, coming = moves(self._here, place, turn < 0, len(self._weights))
            self._here -= gone
            offset = offset - sum(arriving[other].sum(axis=0) for other in gone)
            if coming is not None:
                come(coming)
        add(len(curve.sizes))
        return Curve(
            categories=names,
            sizes=np.concatenate(sizes),
            live=np.concatenate(live),
            hosts=curve.hosts + self.total,
        )


def _sums(weights: Weights) -> Counter[str]:
    """Bytes by category."""
    found: Counter[str] = Counter()
    for category, nbytes in weights:
        found[category] += nbytes
    return found


def _on_host(weights: Weights) -> int:
    """Bytes of the pieces in which they lie there."""
    return sum(map(rounded, packed([nbytes for _, nbytes in weights])[1]))


def _rows(weights: Weights, names: Sequence[str]) -> Ints:
    """(weights, categories): the bytes of each."""
    found = np.zeros((len(weights), len(names)), np.int64)
    for row, (category, nbytes) in enumerate(weights):
        found[row, names.index(category)] = nbytes
    return found
