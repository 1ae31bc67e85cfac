"""Models that predict the noise or v: a table of T noise levels instead of a flow.

Notation: abar_t = prod over s <= t of (1 - beta_s), t from 0 to T - 1; alpha = sqrt(abar), sigma =
sqrt(1 - abar); z = alpha x + sigma n (Ho et al., 2020, arXiv 2006.11239, equation 4); v = alpha n -
sigma x (Salimans and Ho, 2022, arXiv 2202.00512); SNR = abar / (1 - abar). A batch's level is the
place in the table, (t + 1) / T. T is 1000 with few exceptions.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from compiler.noise import TIMESTEPS
from compiler.plan import NoiseTable

_LARGEST_BETA = 0.999  # of the cosine schedule (arXiv 2102.09672, section 3.2)


def timesteps(levels: Tensor, entries: int = TIMESTEPS) -> Tensor:
    """t (B,) int64, from 0 (little noise) to T - 1 = `entries` - 1, for levels (B,) in (0, 1]."""
    return (levels * entries).round().long().clamp(1, entries) - 1


def kept_at(table: NoiseTable, levels: Tensor) -> Tensor:
    """abar (B,) float32 at levels (B,)."""
    return cumulative(table)[timesteps(levels, table.timesteps)]


@lru_cache(maxsize=8)
def cumulative(table: NoiseTable) -> Tensor:
    """abar (T,) float32, in the order and the rounding of Diffusers' schedulers."""
    betas = _betas(table)
    if table.zero_terminal_snr:
        betas = _rescaled(betas)
    return torch.cumprod(1.0 - betas, dim=0)


def _betas(table: NoiseTable) -> Tensor:
    start, end, count = table.beta_start, table.beta_end, table.timesteps
    if table.schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if table.schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    kept = [
        math.cos((step / count + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(count + 1)
    ]
    steps = pairwise(kept)
    return torch.tensor([min(1 - after / before, _LARGEST_BETA) for before, after in steps])


def _rescaled(betas: Tensor) -> Tensor:
    """Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023,
    arXiv 2305.08891), algorithm 1: sqrt(abar) moved and stretched to end at 0."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    kept = ((roots - last) * (first / (first - last))) ** 2
    alphas = torch.cat([kept[:1], kept[1:] / kept[:-1]])
    return 1 - alphas
