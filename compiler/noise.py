"""The table of noise levels: T = 1000 entries, as the schedulers have them at inference.

s_i = (T - i) / T, sigma_i = shift s_i / (1 + (shift - 1) s_i), i from 0 (pure noise) to T - 1.
"""

from __future__ import annotations

import math

from compiler.plan import Objective, ShiftRule

TIMESTEPS = 1000
_NEAR = 1e-9  # a bound that is meant to be an entry may be written rounded


def level(index: int, shift: float) -> float:
    """sigma of one entry, in (0, 1]."""
    unshifted = (TIMESTEPS - index) / TIMESTEPS
    return shift * unshifted / (1 + (shift - 1) * unshifted)


def shift_of_tokens(rule: ShiftRule, tokens: int) -> float:
    """The shift for a picture of so many tokens.

    mu is linear in the tokens: `base_shift` at `base_tokens`, `max_shift` at `max_tokens`, and so
    on beyond both. The shift is e^mu, or mu itself where the rule is "linear": `time_shift` of
    Diffusers' FlowMatchEulerDiscreteScheduler, e^mu / (e^mu + 1 / s - 1), is the table's formula
    with shift e^mu. The idea is section 5.3.2 of arXiv 2403.03206 (more pixels need more noise).
    """
    slope = (rule.max_shift - rule.base_shift) / (rule.max_tokens - rule.base_tokens)
    mu = rule.base_shift + slope * (tokens - rule.base_tokens)
    return math.exp(mu) if rule.kind == "exponential" else mu


def shift_of(objective: Objective, height: int, width: int) -> float:
    """The shift for latents of this size."""
    rule = objective.shift_by_size
    if rule is None:
        return objective.shift
    return shift_of_tokens(rule, (height // rule.patch) * (width // rule.patch))


def trained_entries(objective: Objective, shift: float) -> tuple[int, int] | None:
    """First and last entry with min_sigma <= sigma <= max_sigma; None if there is none."""
    low, high = objective.min_sigma - _NEAR, objective.max_sigma + _NEAR
    inside = [i for i in range(TIMESTEPS) if low <= level(i, shift) <= high]
    return (inside[0], inside[-1]) if inside else None
