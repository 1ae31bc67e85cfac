"""Noise levels, noising, target and loss against the formulas in float64."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from attrs import evolve
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from compiler.plan import Objective
from runtime.batch import Batch
from runtime.noise_levels import sigmas_from_uniform
from runtime.objective import (
    add_noise,
    deltas,
    error_loss,
    loss_weights,
    per_sample_loss,
    velocity_target,
)

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


Kind = Literal["huber", "smooth-l1"]
Schedule = Literal["constant", "snr", "exponential"]
DELTAS = {
    "constant": lambda s, c: torch.full_like(s, c),
    "snr": lambda s, c: (1 - c) / (1 + s / (1 - s)) ** 2 + c,  # with noise / signal
    "exponential": lambda s, c: torch.exp(s * math.log(c)),
}


@pytest.mark.parametrize("schedule", list(DELTAS))
@pytest.mark.parametrize("kind", ["huber", "smooth-l1"])
def test_huber_losses_in_float64(kind: Kind, schedule: Schedule) -> None:
    """Against the formulas as they are published, which cancel in float32."""
    objective = evolve(BASE, loss=kind, delta=0.2, delta_schedule=schedule, weighting="cosmap")
    b = batch(weights=torch.tensor([1.0, 0.5, 2.0]))
    prediction = 3 * torch.randn(3, 4, 6, 5)
    assert b.weights is not None
    s = b.sigmas.double()
    error = prediction.double() - (b.noise.double() - b.latents.double())
    c = DELTAS[schedule](s, 0.2)
    torch.testing.assert_close(deltas(b.sigmas, objective).double(), c, rtol=1e-6, atol=1e-7)
    c = c[:, None, None, None]
    scale = 2 * c if kind == "huber" else 2
    values = scale * ((error**2 + c**2).sqrt() - c)
    weights = b.weights.double() * WEIGHTS["cosmap"](s)
    found = per_sample_loss(prediction, b, objective)
    expected = weights * values.mean((1, 2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_huber_s_two_ends() -> None:
    """A small error counts its square, a large one its size; both without cancellation."""
    sigmas = torch.ones(1)
    small, large = torch.full((1, 1, 1, 1), 1e-5), torch.full((1, 1, 1, 1), 1e4)
    huber = evolve(BASE, loss="huber", delta=0.5)
    assert error_loss(small, sigmas, huber).item() == pytest.approx(1e-10, rel=1e-5)
    assert error_loss(large, sigmas, huber).item() == pytest.approx(1e4 - 0.5, rel=1e-4)
    smooth = evolve(huber, loss="smooth-l1")
    assert error_loss(small, sigmas, smooth).item() == pytest.approx(2e-10, rel=1e-5)
    assert error_loss(large, sigmas, smooth).item() == pytest.approx(2e4 - 1, rel=1e-4)


def test_masks_and_the_scripts_weight_hold_for_huber_too() -> None:
    objective = evolve(BASE, loss="huber", weighting="diffusers-compat")
    b = batch()
    b = evolve(b, mask=torch.rand(3, 1, 6, 5) + 0.5)
    prediction = torch.randn(3, 4, 6, 5)
    values = error_loss(prediction - (b.noise - b.latents), b.sigmas, objective)
    expected = (b.sigmas**2) * (b.mask * values).mean((1, 2, 3))
    torch.testing.assert_close(per_sample_loss(prediction, b, objective), expected)


@pytest.mark.parametrize("kind", ["huber", "smooth-l1"])
def test_the_gradient_at_no_error_is_nothing(kind: Kind) -> None:
    """The square root must not make it NaN."""
    error = torch.zeros(1, 1, 2, 2, requires_grad=True)
    error_loss(error, torch.ones(1), evolve(BASE, loss=kind)).sum().backward()
    assert error.grad is not None and not error.grad.any()
