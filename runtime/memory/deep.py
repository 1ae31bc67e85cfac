"""A deep model's course and sums, from those of a shallow one that has its like of each block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from attrs import evolve

from runtime.memory.curve import NotAlike
from runtime.memory.repeat import More, repeated
from runtime.memory.rounding import rounded
from runtime.memory.shallow import Shallow
from runtime.memory.shares import Form, Share
from runtime.memory.step import Course
from runtime.memory.update import Update
from runtime.memory.waiting import Waiting

STATES = ("optimizer", "ema")  # what is made when an optimizer is primed, and stays

Further = Sequence[tuple[Share, int]]  # how many more blocks have that share


def deep_forms(base: Course, less: Shallow) -> tuple[list[Form], list[Form]]:
    """Of what the deep model's optimizer updates, and of what of it gets no gradient: the shallow
    one's, then those of further blocks, one block after the other."""
    idle = {name for name, _, _ in base.idle}
    further = [
        (form, (f"{form[0]}-{number}", *form[1:]))
        for share, count in _further(base, less)
        for number in range(count)
        for form in share.forms
    ]
    every = [*base.forms, *(copy for _, copy in further)]
    return every, [*base.idle, *(copy for form, copy in further if form[0] in idle)]


def deepened(
    base: Course,
    less: Shallow,
    forms: Sequence[Form],
    update: Update,
    of_batch: Callable[[int], int],
    fused: bool,
) -> Course:
    """The course of the deep model; `base` is that of the model that `less` describes.

    `update` is that of the deep model's `forms`, `of_batch` tells how many of a window's operations
    are one batch's, and `fused` whether weights are updated in the backward pass. Raises NotAlike.
    """
    further, numbers = _further(base, less), base.block_numbers
    held = _sum({}, ((share.held, count) for share, count in further))
    grown = {name: update.primed.get(name, 0) - base.primed.get(name, 0) for name in STATES}
    rest = _sum(held, [(grown, 1)])
    at_rest = More(live=rest, host=0)
    found = _gradients(base, further) if base.stands_for > 1 else {}
    begun = More(live=_sum(rest, [(found, 1)]), host=0)
    window, more = repeated(base.window, less.runs, begun)
    evaluate, judged = repeated(base.evaluate, less.runs, at_rest)
    validate, drawn = repeated(base.validate, less.runs, at_rest)
    norms = rounded(4) * sum(count * len(share.forms) for share, count in further) * fused
    kept = found or {"gradients": more.live.get("gradients", 0), "activations": norms}
    _check(more, rest, kept)
    _check(judged, rest, {})
    _check(drawn, rest, {})
    after = _sum(base.after, [(more.live, 1)])
    deep = evolve(
        base,
        load=_sum(base.load, [(held, 1)]),
        window=window,
        after=after,
        update=update.within(after),
        save=_sum(base.save, [(rest, 1)]),
        evaluate=evaluate,
        validate=validate,
        flops=of_batch((base.spent + more.flops) * base.stands_for),
        parameters=base.parameters + _times(further, "parameters"),
        adapted_modules=base.adapted_modules + _times(further, "adapted_modules"),
        forms=forms,
        block_numbers={
            **numbers,
            "all": numbers["all"] + _times(further, "numbers"),
            "buffer bytes": numbers["buffer bytes"] + _times(further, "buffer_bytes"),
        },
        shares={},
        weights=(),
    )
    blocks = {number: base.weights[like] for number, like in less.waiting.items()}
    return _waited(deep, Waiting(blocks)) if blocks else deep


def _waited(deep: Course, waiting: Waiting) -> Course:
    """That of the model whose blocks wait, from that of the one whose blocks tell their turns."""
    load = _less(deep.load, waiting)
    if deep.stands_for > 1:
        waiting.left_by(deep.window)  # the part that was not run
    window = waiting.follow(deep.window)
    after, save = _less(deep.after, waiting), _less(deep.save, waiting)
    update = [waiting.lower(curve) for curve in deep.update]
    waiting.settle()
    return evolve(
        deep,
        load=load,
        window=window,
        parked=deep.parked + waiting.total,
        after=after,
        update=update,
        save=save,
        evaluate=waiting.follow(deep.evaluate),
        validate=waiting.follow(deep.validate),
    )


def _less(live: Mapping[str, int], waiting: Waiting) -> dict[str, int]:
    """Without what waits."""
    away = waiting.away
    return {name: nbytes - away[name] for name, nbytes in live.items()}


def _check(end: More, rest: Mapping[str, int], kept: Mapping[str, int]) -> None:
    """Raise NotAlike if a block's passes leave more than is `kept` beyond what was there at `rest`:
    when that is freed is not known."""
    if +Counter(end.live) != +Counter(_sum(rest, [(kept, 1)])):
        raise NotAlike("what passes leave is freed at another time")


def _gradients(base: Course, further: Further) -> dict[str, int]:
    """Bytes of those that the further blocks get."""
    idle = {name for name, _, _ in base.idle}
    return {
        "gradients": sum(
            count * rounded(torch.Size(shape).numel() * dtype.itemsize)
            for share, count in further
            for name, shape, dtype in share.forms
            if name not in idle
        )
    }


def _further(base: Course, less: Shallow) -> Further:
    return [(base.shares[number], count) for number, count in less.further.items()]


def _times(further: Further, name: str) -> int:
    return sum(count * int(getattr(share, name)) for share, count in further)


def _sum(one: Mapping[str, int], others: Iterable[tuple[Mapping[str, int], int]]) -> dict[str, int]:
    """With each of `others` so many times; what `one` has not and they have none of is left out."""
    found = Counter(one)
    for other, times in others:
        for name, nbytes in other.items():
            found[name] += times * nbytes
    return {name: nbytes for name, nbytes in found.items() if nbytes or name in one}
