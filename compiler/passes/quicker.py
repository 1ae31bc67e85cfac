"""Rungs beside the ladder, which keeps each saving that it has once chosen.

A saving that comes late may be enough without those before it, and quicker than they are: where
activations wait on the host, say, nothing has to be recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from attrs import evolve, frozen

from compiler.passes.ladder import Rung

TRIES = 2  # simulations at most
WORTH = 0.97  # of the chosen rung's time: the model of time tells no finer


@frozen(kw_only=True)
class Room:
    """Bytes of a rung's activations, and what the budget leaves for them."""

    activations: int
    left: int  # below 0: something else is too much by itself


def beside(
    rungs: Sequence[Rung], chosen: Rung, room: Callable[[Rung], Room], largest: int
) -> list[Rung]:
    """Rungs that may be quicker than `chosen` and fit, the likeliest first.

    Each has the weights, and so the result, of the first rung or of `chosen`, and one saving of
    activations alone. `largest` is the number of samples of the largest batch, to which
    activations are about proportional.
    """
    found: dict[Rung, None] = {}
    for base in (rungs[0], chosen):
        if room(base).left > 0:
            for rung in _alone(rungs, base, room(base), room(rungs[0]).activations, largest):
                found[rung] = None
    return [rung for rung in found if rung not in rungs]


def _alone(
    rungs: Sequence[Rung], base: Rung, room: Room, activations: int, largest: int
) -> Iterator[Rung]:
    """`base` with one saving of activations; `activations` are those of no saving."""
    first = rungs[0]
    plain = evolve(
        base,
        checkpointing=first.checkpointing,
        activations=first.activations,
        micro_batch=first.micro_batch,
    )
    if any(rung.activations for rung in rungs):
        yield evolve(plain, activations=True)
    sizes = sorted({rung.micro_batch for rung in rungs} - {first.micro_batch}, reverse=True)
    fitting = [size for size in sizes if activations * size <= room.left * largest]
    if fitting and not first.fused_backward:
        yield evolve(plain, micro_batch=fitting[0], fused_backward=False)
    if base.activations != first.activations:
        yield evolve(base, activations=first.activations)
