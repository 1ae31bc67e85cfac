"""Which checkpoints stay: one rule, by which runs delete and plans count."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import isfinite, lcm
from typing import Any

from compiler.occasions import Occasions
from compiler.plan import EVALUATION, Checkpoints, Plan

LOSS = f"{EVALUATION}loss"
"""The mean over all held-out images and noise levels; behind a slash, that of one source."""
CLIP_SCORE = f"{EVALUATION}clip_score"
"""The mean over all validation pictures."""

WAITING = 3
"""Checkpoints that are deleted and still wait for the hub: the one on its way, the newest, and one
that was deleted just now."""


def higher_is_better(metric: str) -> bool:
    """Whether the best checkpoint is that with the highest value; else with the lowest."""
    return metric == CLIP_SCORE


def is_finite(value: object) -> bool:
    """Whether a metric is a number that can be drawn and compared."""
    return isinstance(value, int | float) and isfinite(value)


def best_of(rows: Iterable[Mapping[str, Any]], metric: str, steps: Iterable[int]) -> int | None:
    """The one of `steps` at which `metric` was best by the metrics in `rows`; of equals the first.
    None where it was measured at none of them, or was no finite number."""
    among = set(steps)
    found = {
        int(row["step"]): float(row[metric])
        for row in rows
        if int(row["step"]) in among and is_finite(row.get(metric))
    }
    sign = -1.0 if higher_is_better(metric) else 1.0
    return min(found, key=lambda step: (sign * found[step], step), default=None)


def proven(steps: Iterable[int], skipped: Collection[int], done: int) -> int | None:
    """The newest of `steps` whose weights a later update was good with, `done` updates in; None
    without one. Of the updates, those numbered `skipped` were passed over: they changed nothing,
    and weights that overflow may have been their cause."""
    good = done
    while good in skipped:
        good -= 1
    return max((step for step in steps if step < good), default=None)


def doomed(
    steps: Sequence[int], rules: Checkpoints, best: int | None, proven: int | None = None
) -> list[int]:
    """Those of `steps` (in order) whose checkpoints go. The newest always stays: runs go on from
    it. So does the one that is `proven` good, where that is asked."""
    if not rules.keep:
        return []
    return [
        step
        for step in steps[: -rules.keep]
        if step not in (best, proven) and not (rules.keep_every and step % rules.keep_every == 0)
    ]


def waiting(plan: Plan) -> int:
    """The most checkpoints that take room only because the hub is to get them, or one because steps
    after it may be passed over."""
    rules = plan.publish
    sent = WAITING if rules is not None and rules.hub and rules.checkpoints else 0
    return sent + bool(plan.guard.skip)


def at_once(rules: Checkpoints, total: int, waiting: int = 0) -> int:
    """The most checkpoints that lie there at once: a new one is written before an old one goes,
    and `waiting` more wait for the hub."""
    made = Occasions(rules.every, total)
    if not rules.keep or len(made) <= rules.keep + 1:
        return len(made)
    extra = 0
    if rules.keep_every and rules.every:
        extra = (made[-rules.keep - 1] - 1) // lcm(rules.keep_every, rules.every)
    return min(len(made), rules.keep + 1 + extra + bool(rules.best) + waiting)
