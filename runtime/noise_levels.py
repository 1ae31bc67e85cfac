"""At which noise levels a step trains: from stateless uniforms to the table's entries.

u near 0 is pure noise: the direction of Diffusers' training scripts, the reverse of the paper's
(Esser et al., "Scaling Rectified Flow Transformers", 2024, arXiv 2403.03206). The table is that of
`compiler.noise`, and entry i = floor(T u).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compiler.noise import entries_of, shift_of, trained_entries
from compiler.plan import Objective
from runtime import rng

Floats = NDArray[np.float64]

BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
_quantile = NormalDist().inv_cdf
_HALVINGS = 60  # of [0, 1]: below the spacing of float64


def timestep_uniforms(
    objective: Objective, seed: int, step: int, slots: Iterable[int], count: int
) -> Floats:
    """A number in [0, 1) for each of a step's `slots`; `count` is how many the whole step has.

    Stratified, [0, 1) is cut into `count` equal parts, each slot has one of them, in an order that
    is random for each step, and draws uniformly from it. It is a function of (seed, step, slot,
    count), however the step is dealt out to batches and ranks.
    """
    drawn = rng.uniforms(seed, "timestep", step, slots := list(slots))
    if not objective.stratified:
        return drawn
    order = np.argsort(rng.uniforms(seed, "timestep-part", step, range(count)), kind="stable")
    parts = np.empty(count)
    parts[order] = np.arange(count)
    whole: Floats = np.minimum((parts[slots] + drawn) / count, np.nextafter(1.0, 0.0))
    return whole


def noise_levels(objective: Objective, v: Floats, height: int, width: int) -> Tensor:
    """sigma (B,) float32 of the objective's density, for latents of this size, from `v` (B,) in
    [0, 1)."""
    shift = shift_of(objective, height, width)
    entries = _entries(objective, shift)
    u = draw_uniform(objective, _narrowed(objective, v, entries))
    return sigmas_from_uniform(u, objective, shift)


def levels_at(objective: Objective, quantiles: Iterable[float], height: int, width: int) -> Tensor:
    """sigma (B,) float32 at quantiles of the objective's density: 0.9 is noisier than 0.1."""
    shares = np.array(list(quantiles), np.float64)
    falls = objective.sampling != "mode"  # sigma falls as v grows
    v = np.minimum(1 - shares if falls else shares, np.nextafter(1.0, 0.0))
    return noise_levels(objective, v, height, width)


def draw_uniform(objective: Objective, v: Floats) -> Tensor:
    """u in [0, 1) of the objective's density, float32, from uniform `v` in [0, 1) of one shape.

    Section 3.1 of the paper: logit-normal is the logistic function of N(mean, std), here of its
    quantile at v; mode is 1 - v - scale (cos^2(pi v / 2) - 1 + v); cosmap is
    1 - 1 / (tan(pi v / 2) + 1). Beta is exact to the table's entry, and linear inside of it.
    """
    match objective.sampling:
        case "uniform":
            u = v
        case "logit-normal":
            quantiles = np.array([_quantile(max(each, 2.0**-54)) for each in v])
            normal = quantiles * objective.logit_std + objective.logit_mean
            u = np.exp(-np.logaddexp(0.0, -normal))  # the logistic function, without overflow
        case "mode":
            u = _mode(v, objective.mode_scale)
        case "cosmap":
            u = 1 - 1 / (np.tan(np.pi * v / 2) + 1)
        case "beta":
            entries = entries_of(objective)
            below = _beta_table(objective.alpha, objective.beta, entries)
            u = np.interp(v, below, np.arange(entries + 1) / entries)
    return torch.from_numpy(u.astype(np.float32)).clamp(0.0, BELOW_ONE)


def sigmas_from_uniform(u: Tensor, objective: Objective, shift: float = 0.0) -> Tensor:
    """Noise levels (B,) float32 for `u` (B,) in [0, 1], of the trained entries alone; u = 1 is the
    last of them. `shift` 0: the objective's own."""
    shift = shift or objective.shift
    first, last = _entries(objective, shift)
    entries = entries_of(objective)
    index = (u * entries).long().clamp(first, last)
    unshifted = (entries - index).float() / entries
    return shift * unshifted / (1 + (shift - 1) * unshifted)


def _entries(objective: Objective, shift: float) -> tuple[int, int]:
    if objective.min_sigma <= 0.0 and objective.max_sigma >= 1.0:
        return 0, entries_of(objective) - 1
    found = trained_entries(objective, shift)
    assert found is not None, "a plan has noise levels for each of its buckets"
    return found


def _narrowed(objective: Objective, v: Floats, entries: tuple[int, int]) -> Floats:
    """`v` brought to where the density has the trained entries: so it is conditioned on them."""
    (first, last), count = entries, entries_of(objective)
    if (first, last) == (0, count - 1):
        return v
    ends = np.array([first / count, (last + 1) / count])
    low, high = np.sort(_positions(objective, ends))
    narrowed: Floats = low + v * (high - low)
    return narrowed


def _positions(objective: Objective, u: Floats) -> Floats:
    """The v that give `u`: the inverse of `draw_uniform`, in float64."""
    match objective.sampling:
        case "uniform":
            return u
        case "logit-normal":
            normal = NormalDist(objective.logit_mean, objective.logit_std)
            logits = [
                -math.inf if each <= 0 else math.inf if each >= 1 else math.log(each / (1 - each))
                for each in u
            ]
            return np.array([normal.cdf(each) for each in logits])
        case "mode":
            low, high = np.zeros_like(u), np.ones_like(u)
            for _ in range(_HALVINGS):  # it falls from 1 to 0
                middle = (low + high) / 2
                above = _mode(middle, objective.mode_scale) > u
                low, high = np.where(above, middle, low), np.where(above, high, middle)
            return (low + high) / 2
        case "cosmap":
            return 2 / np.pi * np.arctan2(u, 1 - u)
        case "beta":
            count = entries_of(objective)
            places = np.arange(count + 1) / count
            return np.interp(u, places, _beta_table(objective.alpha, objective.beta, count))


def _mode(v: Floats, scale: float) -> Floats:
    return 1 - v - scale * (np.cos(np.pi * v / 2) ** 2 - 1 + v)


@lru_cache(maxsize=4)
def _beta_table(alpha: float, beta: float, entries: int) -> Floats:
    """P(u < i / T) for i from 0 to T: the regularised incomplete beta function."""
    x = np.arange(1, entries) / entries
    left = x < (alpha + 1) / (alpha + beta + 2)  # where the fraction converges fast
    table = np.empty(entries + 1)
    table[0], table[-1] = 0.0, 1.0
    table[1:-1][left] = _incomplete_beta(x[left], alpha, beta)
    table[1:-1][~left] = 1 - _incomplete_beta(1 - x[~left], beta, alpha)
    table.setflags(write=False)
    return table


def _incomplete_beta(x: Floats, a: float, b: float) -> Floats:
    """I_x(a, b) by its continued fraction (DLMF 8.17.22), from the last term back."""
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) - math.log(a)
    front = np.exp(log_front + a * np.log(x) + b * np.log1p(-x))
    fraction = np.ones_like(x)
    for term in range(int(100 + 10 * math.sqrt(max(a, b))), 0, -1):
        m = term // 2
        if term % 2:
            factor = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            factor = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + factor * x / fraction
    result: Floats = front / fraction
    return result
