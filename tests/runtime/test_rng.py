"""Noise: normal, the same everywhere, and a function of (seed, purpose, step, slot) alone."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from runtime import rng
from runtime.noise_levels import draw_uniform
from tests.runtime.test_objective import BASE

TABLE = "8babbcaf96568f10165a1eab530c0e5c"
NOISE = "453616bfee45d0242222f4d1cca52cde"


def digest(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> str:
    return hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()[:32]


def test_noise_is_pinned() -> None:
    """Changing it changes the trajectory of all runs, and a platform that differs can't resume."""
    assert digest(rng._quantiles()) == TABLE
    assert digest(rng.normal((3, 5, 7), 42, "noise", 3, 1).numpy()) == NOISE


def test_the_distribution_is_normal() -> None:
    """The distribution function of the sum, from its table in float64, against erf."""
    table = np.sort(rng._quantiles().astype(np.float64))
    assert np.array_equal(table, -table[::-1]) and len(np.unique(table)) == rng.CELLS
    first, second = table * 20 / 29, table * 21 / 29
    worst = 0.0
    for x in np.linspace(-6, 6, 97):
        found = np.searchsorted(second, x - first, side="right").mean() / rng.CELLS
        worst = max(worst, abs(found - 0.5 * (1 + math.erf(x / math.sqrt(2)))))
    assert worst < 3e-6
    assert (table**2).mean() == pytest.approx(1, abs=1e-6)
    assert (first.max() + second.max()) > 6


def test_moments_and_independence() -> None:
    values = rng.normals((64, 1024), 7, "noise", 3, range(8)).double().flatten(1)
    count = values.shape[1]
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = math.sqrt(math.prod(range(1, 4 * power, 2)) / count)
        assert (values**power).mean(1).sub(expected).abs().max() < 5 * spread
    between = values @ values.T / count - torch.eye(8)
    assert between.fill_diagonal_(0).abs().max() < 5 / math.sqrt(count)
    near = (values[:, 1:] * values[:, :-1]).mean()
    halves = (values[:, : count // 2] * values[:, count // 2 :]).mean()
    assert max(abs(near), abs(halves)) < 5 / math.sqrt(8 * count)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 8, 8), (0,), (40, 64, 64)])
def test_each_slot_has_its_own(shape: tuple[int, ...]) -> None:
    together = rng.normals(shape, 1, "noise", 9, range(2, 6))
    assert together.dtype == torch.float32 and together.shape == (4, *shape)
    for row, slot in zip(together, range(2, 6), strict=True):
        assert torch.equal(row, rng.normal(shape, 1, "noise", 9, slot))
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda slot: rng.normal(shape, 1, "noise", 9, slot), range(2, 6)))
        for threads in (1, 2, 3, 9):
            shared = rng.normals(shape, 1, "noise", 9, range(2, 6), pool, threads)
            assert torch.equal(shared, together)
    assert torch.equal(torch.stack(again), together)
    if torch.Size(shape).numel():
        others = [(2, "noise", 9, 2), (1, "posterior", 9, 2), (1, "noise", 8, 2)]
        assert not any(torch.equal(together[0], rng.normal(shape, *each)) for each in others)


def test_uniform_numbers() -> None:
    values = rng.uniforms(3, "timestep", 5, range(20_000))
    assert values[7] == rng.uniform(3, "timestep", 5, 7) and values.dtype == np.float64
    assert values.min() >= 0 and values.max() < 1
    ordered = np.sort(values)
    steps = np.arange(1, 20_001) / 20_000
    assert np.abs(ordered - steps).max() < 1.63 / math.sqrt(20_000)  # Kolmogorov, 1 in 100
    u = draw_uniform(BASE, values)
    assert torch.equal(u, torch.from_numpy(values.astype(np.float32)))
