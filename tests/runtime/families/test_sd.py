"""Stable Diffusion 1 and 2 against Diffusers: prompts, pictures, noise and targets."""

from __future__ import annotations

from functools import cache

import diffusers
import pytest
import torch

from compiler.families import FAMILIES
from compiler.noise import noise_table, predicted
from compiler.plan import Objective
from runtime.batch import Batch
from runtime.families.common import encode_prompts
from runtime.noise_levels import sigmas_from_uniform
from runtime.noise_table import cumulative, kept_at, timesteps
from runtime.objective import deltas, noised, per_sample_loss, target_of
from tests.runtime.families.conformance import (
    PROMPTS,
    Opened,
    check_parameters,
    check_pictures,
    opened,
)

CARD = FAMILIES["sd"]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("sd")
    return opened("sd", folder, prediction_type=request.param)


def test_known_models_have_the_published_sizes() -> None:
    check_parameters("sd")


@torch.no_grad()
def test_embeddings_are_the_stock_pipeline_s(tiny: Opened) -> None:
    found = encode_prompts(tiny.family, tiny.parts, PROMPTS, tiny.text)
    expected, negative = tiny.stock.encode_prompt(PROMPTS, torch.device("cpu"), 1, True, PROMPTS)
    for ours, one, other in zip(found, expected, negative, strict=True):
        assert torch.equal(ours["encoder_hidden_states"], one)
        assert torch.equal(ours["encoder_hidden_states"], other)


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_pictures_are_the_stock_pipeline_s(tiny: Opened, guidance: float) -> None:
    check_pictures(tiny, guidance)


def batch_of(levels: torch.Tensor, objective: Objective) -> Batch:
    shape = (len(levels), 4, 8, 8)
    generator = torch.Generator().manual_seed(1)
    assert objective.table is not None
    return Batch(
        latents=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        sigmas=levels,
        kept=kept_at(objective.table, levels),
        text={},
    )


@cache
def objective(prediction: str = "epsilon", zero: bool = False, **options: object) -> Objective:
    scheduler = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": options.pop("schedule", "scaled_linear"),
        "prediction_type": "v_prediction" if prediction == "v" else prediction,
        "rescale_betas_zero_snr": zero,
    }
    given = {"loss": "mse", "weighting": "none", **options}
    return Objective(
        prediction=predicted(CARD, scheduler),
        table=noise_table(CARD, scheduler),
        sampling="uniform",
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
        shift=1.0,
        **given,  # type: ignore[arg-type]
    )


EVERY = (torch.arange(1000) + 1).float() / 1000


def test_every_level_is_one_timestep() -> None:
    assert torch.equal(timesteps(EVERY), torch.arange(1000))
    drawn = sigmas_from_uniform(torch.linspace(0, 1, 5000), objective())
    assert set(timesteps(drawn).tolist()) == set(range(1000))
    assert timesteps(sigmas_from_uniform(torch.zeros(1), objective())).item() == 999


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_noise_and_v_are_the_scheduler_s(schedule: str, zero: bool) -> None:
    """Diffusers' DDPMScheduler adds the noise, in float32, and says what v is."""
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=schedule,
        rescale_betas_zero_snr=zero,
        prediction_type="v_prediction",
    )
    ours = objective("v", zero, schedule=schedule)
    assert ours.table is not None
    assert torch.equal(cumulative(ours.table), scheduler.alphas_cumprod)
    batch = batch_of(EVERY, ours)
    times = torch.arange(1000)
    noisy = scheduler.add_noise(batch.latents, batch.noise, times)
    assert torch.equal(noised(batch, ours), noisy)
    assert torch.equal(
        target_of(batch, ours), scheduler.get_velocity(batch.latents, batch.noise, times)
    )
    assert torch.equal(target_of(batch, objective()), batch.noise)


@pytest.mark.parametrize("weighting", ["min-snr", "soft-min-snr"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_weights_by_snr(prediction: str, weighting: str) -> None:
    """By the error of the picture x itself, as the papers define it, in float64."""
    ours = objective(prediction, weighting=weighting, gamma=5.0)
    batch = batch_of(EVERY, ours)
    wrong = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(2))
    losses = per_sample_loss(wrong, batch, ours).double()
    assert batch.kept is not None
    kept = batch.kept.double()[:, None, None, None]
    x, n, predicted_ = (t.double() for t in (batch.latents, batch.noise, wrong))
    z = kept.sqrt() * x + (1 - kept).sqrt() * n
    if prediction == "epsilon":
        picture = (z - (1 - kept).sqrt() * predicted_) / kept.sqrt()
    else:
        picture = kept.sqrt() * z - (1 - kept).sqrt() * predicted_
    snr = (kept / (1 - kept)).flatten()
    weights = snr.clamp(max=5.0) if weighting == "min-snr" else snr * 5 / (snr + 5)
    expected = weights * ((picture - x) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=2e-4, atol=1e-9)


def test_pure_noise_weighs_nothing_in_v() -> None:
    ours = objective("v", True, weighting="min-snr")
    batch = batch_of(EVERY, ours)
    losses = per_sample_loss(batch.latents, batch, ours)
    assert torch.isfinite(losses).all()
    assert losses[-1] == 0.0


def test_huber_follows_the_snr() -> None:
    """delta + (1 - delta) / (1 + noise / signal)^2, in float64."""
    ours = objective(loss="huber", delta=0.1, delta_schedule="snr")
    assert ours.table is not None
    kept = kept_at(ours.table, EVERY)
    ratio = ((1 - kept.double()) / kept.double()).sqrt()
    expected = 0.1 + 0.9 / (1 + ratio) ** 2
    torch.testing.assert_close(deltas(EVERY, ours, kept).double(), expected, rtol=1e-5, atol=0)
