"""Noise levels, noising, target and loss against the formulas in float64."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from attrs import evolve
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor

from compiler.plan import Objective
from runtime.batch import Batch
from runtime.objective import (
    add_noise,
    draw_uniform,
    loss_weights,
    per_sample_loss,
    sigmas_from_uniform,
    velocity_target,
)
from runtime.rng import generator

Sampling = Literal["uniform", "logit-normal", "mode", "cosmap"]
BASE = Objective(
    prediction="flow",
    sampling="uniform",
    logit_mean=0.0,
    logit_std=1.0,
    mode_scale=1.29,
    shift=3.0,
    loss="mse",
    weighting="none",
)


def batch(weights: Tensor | None = None) -> Batch:
    torch.manual_seed(0)
    latents, noise = torch.randn(3, 4, 6, 5), torch.randn(3, 4, 6, 5)
    sigmas = torch.tensor([0.001, 0.6, 1.0])
    return Batch(latents=latents, noise=noise, sigmas=sigmas, text={}, weights=weights)


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


def test_noising_and_target_in_float64() -> None:
    b = batch()
    x, n, s = b.latents.double(), b.noise.double(), b.sigmas.double()[:, None, None, None]
    noisy = add_noise(b.latents, b.noise, b.sigmas)
    torch.testing.assert_close(noisy.double(), (1 - s) * x + s * n, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        velocity_target(b.latents, b.noise).double(), n - x, rtol=1e-6, atol=1e-7
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = scheduler.timesteps[[0, 400, 999]]
    sigmas = sigmas_from_uniform(torch.tensor([0.0, 0.4005, 0.9995]), BASE)
    theirs = scheduler.scale_noise(b.latents, times, b.noise)
    torch.testing.assert_close(add_noise(b.latents, b.noise, sigmas), theirs, rtol=1e-6, atol=1e-6)


WEIGHTS = {
    "none": lambda s: torch.ones_like(s),
    "diffusers-compat": lambda s: s**2,
    "sigma-sqrt": lambda s: s**-2,
    "cosmap": lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s**2)),
}


@pytest.mark.parametrize("weighting", list(WEIGHTS))
def test_losses_in_float64(
    weighting: Literal["none", "diffusers-compat", "sigma-sqrt", "cosmap"],
) -> None:
    objective = evolve(BASE, weighting=weighting)
    b = batch(weights=torch.tensor([1.0, 0.5, 2.0]))
    prediction = torch.randn(3, 4, 6, 5)
    assert b.weights is not None
    s = b.sigmas.double()
    error = prediction.double() - (b.noise.double() - b.latents.double())
    expected = b.weights.double() * WEIGHTS[weighting](s) * (error**2).mean((1, 2, 3))
    found = per_sample_loss(prediction, b, objective)
    assert found.dtype == torch.float32 and found.shape == (3,)
    # sigma^2 at 0.001 is formed as z - sigma v - x, as the scripts do: x cancels there
    tolerance = 2e-3 if weighting == "diffusers-compat" else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(
        loss_weights(b.sigmas, objective).double(), WEIGHTS[weighting](s), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("ours", "theirs"), [("sigma-sqrt", "sigma_sqrt"), ("cosmap", "cosmap")])
def test_weights_are_the_scripts(ours: Literal["sigma-sqrt", "cosmap"], theirs: str) -> None:
    sigmas = torch.linspace(0.01, 1, 50)
    expected = compute_loss_weighting_for_sd3(theirs, sigmas)
    assert torch.equal(loss_weights(sigmas, evolve(BASE, weighting=ours)), expected)


def test_a_low_precision_prediction_is_compared_in_float32() -> None:
    b = batch()
    prediction = torch.randn(3, 4, 6, 5, dtype=torch.bfloat16)
    assert torch.equal(
        per_sample_loss(prediction, b, BASE), per_sample_loss(prediction.float(), b, BASE)
    )
