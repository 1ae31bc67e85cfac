"""Noise levels: densities, ranges, shifts and strata against formulas in float64."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from attrs import evolve
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from compiler.noise import shift_of
from compiler.plan import ShiftRule
from runtime.noise_levels import (
    draw_uniform,
    levels_at,
    noise_levels,
    sigmas_from_uniform,
    timestep_uniforms,
)
from runtime.rng import generator
from tests.runtime.test_objective import BASE

Sampling = Literal["uniform", "logit-normal", "mode", "cosmap", "beta"]
EVEN = (np.arange(100_000) + 0.5) / 100_000  # v of equal weight


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_noise_levels_are_the_scheduler_s_table(shift: float) -> None:
    """u in the middle of entry i gives entry i, as the training scripts index it, bit for bit."""
    u = (torch.arange(1000) + 0.5) / 1000
    sigmas = sigmas_from_uniform(u, evolve(BASE, shift=shift))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert torch.equal(1000 * sigmas, scheduler.timesteps)
    s = (1000 - np.arange(1000)) / 1000
    np.testing.assert_allclose(sigmas, shift * s / (1 + (shift - 1) * s), rtol=3e-7)


def test_the_ends_of_u() -> None:
    sigmas = sigmas_from_uniform(torch.tensor([0.0, 0.9999999, 1.0]), BASE)
    assert sigmas[0] == 1.0  # u near 0 is pure noise
    assert sigmas[1] == sigmas[2] > 0  # 1 would be behind the table's end


@pytest.mark.parametrize(
    ("sampling", "mean", "std", "median"),
    [
        ("uniform", 0.0, 1.0, 0.5),
        ("logit-normal", 0.0, 1.0, 0.5),
        ("logit-normal", 0.5, 1.0, 1 / (1 + math.exp(-0.5))),
        ("mode", 0.0, 1.0, 0.5),
        ("cosmap", 0.0, 1.0, 0.5),
    ],
)
def test_densities_have_their_quantiles(
    sampling: Sampling, mean: float, std: float, median: float
) -> None:
    objective = evolve(BASE, sampling=sampling, logit_mean=mean, logit_std=std)
    u = draw_uniform(objective, generator(0, "test").random(40_000))
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert u.median().item() == pytest.approx(median, abs=0.012)
    if sampling == "cosmap":  # P(u < a) = 2 / pi atan(a / (1 - a))
        share = (u < 0.2).double().mean().item()
        assert share == pytest.approx(2 / math.pi * math.atan(0.25), abs=0.008)


@pytest.mark.parametrize("sampling", ["logit-normal", "mode"])
def test_densities_are_the_scripts(sampling: Sampling) -> None:
    """The same quantiles as Diffusers' own function draws."""
    objective = evolve(BASE, sampling=sampling, logit_mean=0.3, logit_std=0.8)
    u = draw_uniform(objective, generator(1, "test").random(40_000))
    theirs = compute_density_for_timestep_sampling(
        sampling.replace("-", "_"),
        40_000,
        logit_mean=0.3,
        logit_std=0.8,
        mode_scale=1.29,
        generator=torch.Generator().manual_seed(0),
    )
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(u.quantile(levels), theirs.quantile(levels), rtol=0, atol=0.015)


def test_u_stays_below_one_where_it_saturates() -> None:
    wide = evolve(BASE, sampling="logit-normal", logit_std=100.0)
    u = draw_uniform(wide, generator(0, "test").random(1000))
    assert u.max() < 1 and u.isfinite().all()
    assert (sigmas_from_uniform(u, wide) > 0).all()


def test_shifted_noise_levels_have_the_stated_medians() -> None:
    """Shift 3: median 0.75 with mean 0, 0.60 with mean ln 2... the logit falls by the mean."""
    for mean, median in ((0.0, 0.75), (0.5, 3 / (3 + math.exp(0.5)))):
        objective = evolve(BASE, sampling="logit-normal", logit_mean=mean)
        sigmas = sigmas_from_uniform(
            draw_uniform(objective, generator(2, "t").random(40_000)), objective
        )
        assert sigmas.median().item() == pytest.approx(median, abs=0.01)


def _beta_shares(alpha: float, beta: float) -> np.ndarray:
    """P(u < i / 1000) by the midpoint rule, with u = sin^2 t: no pole at either end."""
    t = (np.arange(2_000_000) + 0.5) / 2_000_000 * np.pi / 2
    mass = np.sin(t) ** (2 * alpha - 1) * np.cos(t) ** (2 * beta - 1)
    whole = np.concatenate([[0.0], np.cumsum(mass)]) / mass.sum()
    ends = np.arcsin(np.sqrt(np.arange(1001) / 1000)) / (np.pi / 2)
    return np.interp(ends, np.arange(2_000_001) / 2_000_000, whole)


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 2.0), (0.5, 0.5), (3.0, 1.0), (0.6, 40.0)])
def test_beta_is_the_integral_of_its_density(alpha: float, beta: float) -> None:
    """Of evenly spread v, each entry of the table gets the share that its density has there."""
    objective = evolve(BASE, sampling="beta", alpha=alpha, beta=beta)
    u = draw_uniform(objective, EVEN)
    shares = np.searchsorted(np.sort(u.numpy()), np.arange(1001, dtype=np.float32) / 1000)
    np.testing.assert_allclose(shares / 100_000, _beta_shares(alpha, beta), atol=2e-5)


def test_beta_where_there_is_a_closed_form() -> None:
    """Beta(1, 1) is uniform, Beta(1/2, 1/2) the arcsine's, Beta(3, 1) has F = u^3."""
    v = EVEN[::100]
    for alpha, beta, u in (
        (1.0, 1.0, v),
        (0.5, 0.5, np.sin(np.pi * v / 2) ** 2),
        (3.0, 1.0, np.cbrt(v)),
    ):
        found = draw_uniform(evolve(BASE, sampling="beta", alpha=alpha, beta=beta), v)
        np.testing.assert_allclose(found, u, atol=6e-4)  # half an entry


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal", "mode", "cosmap", "beta"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (0.3, 0.75), (0.6, 1.0)])
def test_a_range_keeps_the_density_s_shape(sampling: Sampling, low: float, high: float) -> None:
    """What is drawn inside a range is what of the whole density falls there."""
    whole = evolve(BASE, sampling=sampling, logit_mean=0.4, alpha=1.5, beta=3.0)
    some = evolve(whole, min_sigma=low, max_sigma=high)
    every = noise_levels(whole, EVEN, 8, 8).double()
    kept = every[(every >= low - 1e-6) & (every <= high + 1e-6)].sort().values
    drawn = noise_levels(some, EVEN, 8, 8).double().sort().values
    assert drawn[0] >= low - 1e-6 and drawn[-1] <= high + 1e-6
    assert low == 0 or drawn[0] == kept[0]  # it reaches the bounds
    assert high == 1 or drawn[-1] == kept[-1]
    shares = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    at = [values[(shares * len(values)).long()] for values in (drawn, kept)]
    torch.testing.assert_close(at[0], at[1], rtol=0, atol=2.5e-3)  # an entry or two


def test_both_ends_of_a_range_are_trained() -> None:
    """At shift 3, entry 500 is exactly 0.75 and entry 750 exactly 0.5."""
    objective = evolve(BASE, min_sigma=0.5, max_sigma=0.75)
    found = noise_levels(objective, EVEN, 8, 8)
    assert found.max() == 0.75 and found.min() == 0.5
    assert len(found.unique()) == 251


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (128, 128), (96, 160)])
def test_shift_by_resolution_is_the_pipeline_s(
    kind: Literal["exponential", "linear"], height: int, width: int
) -> None:
    rule = ShiftRule(
        patch=2, base_tokens=256, max_tokens=4096, base_shift=0.5, max_shift=1.16, kind=kind
    )
    objective = evolve(BASE, shift=0.0, shift_by_size=rule)
    mu = calculate_shift(height * width // 4, 256, 4096, 0.5, 1.16)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    s = (1000 - np.arange(1000)) / 1000
    expected = scheduler.time_shift(mu, 1.0, s)
    found = noise_levels(objective, (np.arange(1000) + 0.5) / 1000, height, width)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert shift_of(objective, height, width) == pytest.approx(
        math.exp(mu) if kind == "exponential" else mu
    )


def test_strata_share_the_density_out() -> None:
    """Each of n samples has an n-th of its own; where, differs from step to step."""
    objective = evolve(BASE, stratified=True)
    count, seen = 12, set()
    for step in range(50):
        v = timestep_uniforms(objective, 7, step, range(count), count)
        assert sorted(int(each) for each in v * count) == list(range(count))
        seen.add(int(v[0] * count))
    assert len(seen) == count


def test_strata_are_independent_of_how_a_step_is_cut() -> None:
    objective = evolve(BASE, stratified=True)
    whole = timestep_uniforms(objective, 7, 3, range(10), 10)
    parts = [timestep_uniforms(objective, 7, 3, slots, 10) for slots in (range(4), range(4, 10))]
    assert np.array_equal(whole, np.concatenate(parts))
    plain = timestep_uniforms(BASE, 7, 3, range(10), 10)
    assert not np.array_equal(whole, plain)
    np.testing.assert_allclose((whole * 10) % 1, plain, atol=1e-12)


def test_strata_are_uniform_over_many_steps() -> None:
    objective = evolve(BASE, stratified=True)
    v = np.concatenate([timestep_uniforms(objective, 1, s, range(3), 3)[:1] for s in range(4000)])
    np.testing.assert_allclose(np.quantile(v, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal", "mode", "cosmap", "beta"])
def test_levels_at_quantiles_are_the_density_s(sampling: Sampling) -> None:
    objective = evolve(BASE, sampling=sampling, logit_mean=0.3, alpha=2.0, beta=1.2)
    drawn = noise_levels(objective, EVEN, 8, 8).double()
    shares = [0.02, 0.1, 0.5, 0.9, 0.98]
    found = levels_at(objective, shares, 8, 8).double()
    np.testing.assert_allclose(found, np.quantile(drawn, shares), atol=4e-3)
    assert (found.diff() > 0).all()
