"""Learning rate schedules: the multiplier of the learning rate at each step.

With W warm-up steps and length L, the step numbered k (from 0) is trained at

    (k + 1) / W                          for k < W     (the first step is not wasted on 0)
    shape(p),  p = (k - W) / (L - W)     for k >= W

so that the rate reaches the recipe's at the last warm-up step and the shape's end (`end`) exactly
when step L - 1 is done: the shape would be at `end` at k = L, and stays there. After the warm-up
these are the schedules of `diffusers.optimization`, whose own warm-up is k / W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from compiler.plan import Schedule


def _constant(schedule: Schedule, progress: float) -> float:
    return 1.0


def _linear(schedule: Schedule, progress: float) -> float:
    return schedule.end + (1.0 - schedule.end) * (1.0 - progress)


def _cosine(schedule: Schedule, progress: float) -> float:
    """Loshchilov and Hutter, "SGDR", arXiv 1608.03983, equation 5, over the whole run."""
    return schedule.end + (1.0 - schedule.end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _restarts(schedule: Schedule, progress: float) -> float:
    """SGDR with `cycles` equal periods: it falls, begins at 1 again, and ends the run at `end`."""
    if progress >= 1.0:
        return schedule.end
    return _cosine(schedule, (schedule.cycles * progress) % 1.0)


def _polynomial(schedule: Schedule, progress: float) -> float:
    return float(schedule.end + (1.0 - schedule.end) * (1.0 - progress) ** schedule.power)


SHAPES: Mapping[str, Callable[[Schedule, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine-with-restarts": _restarts,
    "polynomial": _polynomial,
}


def multiplier(schedule: Schedule, step: int) -> float:
    """The learning rate of the update numbered `step` (from 0), as a share of the recipe's."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    decay = schedule.length - schedule.warmup
    progress = min(1.0, (step - schedule.warmup) / decay) if decay > 0 else 1.0
    return SHAPES[schedule.name](schedule, progress)


def curve(schedule: Schedule, points: int) -> list[float]:
    """`points` multipliers spread evenly over the run's steps, first and last included."""
    last = max(schedule.length - 1, 0)
    return [multiplier(schedule, round(i * last / max(points - 1, 1))) for i in range(points)]
