"""After which steps of a plan something happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from compiler.plan import Plan


class Occasions(Sequence[int]):
    """Steps in order: perhaps 0, then every n-th, and the last one in any case.

    As little is kept as a `range` keeps: a run may have a hundred million steps.
    """

    def __init__(self, every: int, total: int, *, start: bool = False) -> None:
        """`every` 0: only at the end."""
        self._start = int(start)
        self._regular = range(every, total + 1, every) if every else range(0)
        ends = bool(self._regular) and self._regular[-1] == total
        self._last: tuple[int, ...] = () if ends or total < 1 else (total,)

    def __len__(self) -> int:
        return self._start + len(self._regular) + len(self._last)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]  # counts from the end where negative, and checks
        if at < self._start:
            return 0
        at -= self._start
        return self._regular[at] if at < len(self._regular) else self._last[0]

    def __contains__(self, step: object) -> bool:
        return step in self._regular or step in self._last or (step == 0 and self._start == 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list's


def validation_steps(plan: Plan) -> Occasions:
    """Steps after which pictures are drawn; 0 is the untrained model."""
    if not plan.validation.prompts:
        return Occasions(1, 0)
    return Occasions(plan.validation.every, plan.steps.total, start=plan.validation.at_start)


def evaluation_steps(plan: Plan) -> Occasions:
    """Steps after which the loss of what is held out is measured; 0 is the untrained model."""
    if plan.evaluation is None:
        return Occasions(1, 0)
    return Occasions(plan.evaluation.every, plan.steps.total, start=True)


def checkpoint_steps(plan: Plan) -> Occasions:
    """Steps after which a checkpoint is written; the last step always is one."""
    return Occasions(plan.checkpoints.every, plan.steps.total)
