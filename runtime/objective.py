"""What the model learns: noising, target and loss.

Flow matching: latents x, noise n, noise level sigma in (0, 1]; z = (1 - sigma) x + sigma n; the
model predicts the velocity v = n - x (Esser et al., "Scaling Rectified Flow Transformers", 2024,
arXiv 2403.03206). Models that predict the noise or v: `runtime.noise_table`. Where noise levels
come from: `runtime.noise_levels`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compiler.plan import Objective
from runtime.batch import Batch


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """z = (1 - sigma) x + sigma n, all in float32: a rounded sigma would not be the time's."""
    levels = _per_sample(sigmas)
    return (1.0 - levels) * latents + levels * noise


def noised(batch: Batch, objective: Objective) -> Tensor:
    """The noisy latents z (B, C, h, w) float32 of a batch."""
    if batch.kept is None:
        return add_noise(batch.latents, batch.noise, batch.sigmas)
    signal, noise = _signal_and_noise(batch.kept)
    return signal * batch.latents + noise * batch.noise


def target_of(batch: Batch, objective: Objective) -> Tensor:
    """What the model is to predict, (B, C, h, w) float32: velocity, noise, or v."""
    match objective.prediction:
        case "flow":
            return velocity_target(batch.latents, batch.noise)
        case "epsilon":
            return batch.noise
        case "v":
            assert batch.kept is not None, "v is defined by a table"
            signal, noise = _signal_and_noise(batch.kept)
            return signal * batch.noise - noise * batch.latents


def _signal_and_noise(kept: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar) and sqrt(1 - abar), (B, 1, 1, 1)."""
    return _per_sample(kept.sqrt()), _per_sample((1 - kept).sqrt())


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """n - x."""
    return noise - latents


def loss_weights(sigmas: Tensor, objective: Objective, kept: Tensor | None = None) -> Tensor:
    """Weights (B,) of the prediction's loss, float32.

    "min-snr" weighs the error of x by min(SNR, gamma) (Hang et al., "Efficient Diffusion Training
    via Min-SNR Weighting Strategy", 2023, arXiv 2303.09556, section 3.4), "soft-min-snr" by the
    same without its corner, SNR gamma / (SNR + gamma). The error of x is that of the noise over
    sqrt(SNR), and that of v over sqrt(SNR + 1). `kept` (B,) is abar, SNR = abar / (1 - abar).

    "diffusers-compat" is sigma^2: the SD3 scripts compare x with z - sigma v, whose error is
    sigma times the velocity's. "sigma-sqrt" is sigma^-2; "cosmap" is 2 / (pi (1 - 2 s + 2 s^2)).
    """
    match objective.weighting:
        case "none":
            return torch.ones_like(sigmas)
        case "diffusers-compat":
            return sigmas**2
        case "sigma-sqrt":
            return sigmas**-2.0
        case "cosmap":
            return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
        case "min-snr" | "soft-min-snr" as kind:
            assert kept is not None, "a plan weighs by SNR where there is a table"
            # of the noise's error, the one over SNR: min(1, gamma / SNR) and gamma / (SNR + gamma)
            snr, gamma = kept / (1 - kept), objective.gamma
            weights = (gamma / snr).clamp(max=1.0) if kind == "min-snr" else gamma / (snr + gamma)
            return weights * kept if objective.prediction == "v" else weights


def deltas(sigmas: Tensor, objective: Objective, kept: Tensor | None = None) -> Tensor:
    """Where the square of a Huber loss ends, (B,) float32, for noise levels (B,).

    Khrapov et al., "Improving Diffusion Models's Data-Corruption Resistance using Scheduled
    Pseudo-Huber Loss" (2024, arXiv 2403.16728): "exponential" is e^(-k t) that reaches delta at the
    last timestep; "snr" is delta + (1 - delta) / (1 + noise / signal)^2. In flow matching
    noise / signal is sigma / (1 - sigma), so that the last factor is (1 - sigma)^2.
    """
    match objective.delta_schedule:
        case "constant":
            return torch.full_like(sigmas, objective.delta)
        case "snr":
            share = 1 - sigmas
            if kept is not None:
                share = kept.sqrt() / (kept.sqrt() + (1 - kept).sqrt())
            return objective.delta + (1 - objective.delta) * share**2
        case "exponential":
            return objective.delta**sigmas


def error_loss(
    error: Tensor, sigmas: Tensor, objective: Objective, kept: Tensor | None = None
) -> Tensor:
    """The loss of each error e (B, C, h, w), float32: e^2, or with c of `deltas` the pseudo-Huber
    2 c (sqrt(e^2 + c^2) - c), or that over c ("smooth-l1").

    Near 0 the pseudo-Huber is e^2, and so of one size with the others.
    """
    squared = error**2
    if objective.loss == "mse":
        return squared
    delta = _per_sample(deltas(sigmas, objective, kept))
    # sqrt(e^2 + c^2) - c without its cancellation
    beyond = squared / (torch.sqrt(squared + delta**2) + delta)
    return 2 * beyond if objective.loss == "smooth-l1" else 2 * delta * beyond


def per_sample_loss(
    prediction: Tensor, batch: Batch, objective: Objective, target: Tensor | None = None
) -> Tensor:
    """Weighted loss of the prediction, mean over (C, h, w), per sample: (B,) float32.

    `target` (B, C, h, w) is learned instead of the objective's own, if given. With a mask m it is
    sum(m e) / sum(m) over the places (h, w), e the mean over C: a sample weighs the same however
    little of it the mask shows.
    """
    velocity = prediction.float()
    if target is None and objective.weighting == "diffusers-compat" and objective.loss == "mse":
        values = _script_error(velocity, batch) ** 2
    else:
        if target is None:
            target = target_of(batch, objective)
        error = velocity - target.float()
        values = error_loss(error, batch.sigmas, objective, batch.kept)
        if objective.weighting != "none":
            values = _per_sample(loss_weights(batch.sigmas, objective, batch.kept)) * values
    if batch.mask is not None:
        values = batch.mask * values
    if batch.weights is not None:
        values = _per_sample(batch.weights) * values
    return values.flatten(1).mean(1)


def place_weights(shown: Tensor, floor: float) -> Tensor:
    """Weights of places, (B, 1, h, w) with mean 1, from the masks' shares `shown` (B, h, w).

    floor + (1 - floor) shown, over its mean. Some weight must be above 0 in each sample.
    """
    weights = floor + (1.0 - floor) * shown
    return (weights / weights.mean((1, 2), keepdim=True))[:, None]


def _script_error(velocity: Tensor, batch: Batch) -> Tensor:
    """sigma (n - x - v) as the SD3 scripts round it: (z - sigma v) - x.

    In exact arithmetic it is the velocity's error times sigma; in float32 the difference is enough
    for Adam to tell, so their runs are only reproduced to the last bit in their own form.
    """
    noisy = add_noise(batch.latents, batch.noise, batch.sigmas)
    return velocity * _per_sample(-batch.sigmas) + noisy - batch.latents


def _per_sample(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to go with latents."""
    return values[:, None, None, None]
