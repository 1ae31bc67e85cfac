"""What the model learns: noising, target and loss of flow matching.

Notation: latents x, noise n, noise level sigma in (0, 1]; z = (1 - sigma) x + sigma n; the model
predicts the velocity v = n - x (Esser et al., "Scaling Rectified Flow Transformers", 2024,
arXiv 2403.03206). Where noise levels come from: `runtime.noise_levels`.
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


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """n - x."""
    return noise - latents


def loss_weights(sigmas: Tensor, objective: Objective) -> Tensor:
    """Weights (B,) of the velocity's loss, float32.

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


def deltas(sigmas: Tensor, objective: Objective) -> Tensor:
    """Where the square of a Huber loss ends, (B,) float32, for noise levels (B,).

    Khrapov et al., "Improving Diffusion Models's Data-Corruption Resistance using Scheduled
    Pseudo-Huber Loss" (2024, arXiv 2403.16728): "exponential" is e^(-k t) that reaches delta at the
    last timestep; "snr" is delta + (1 - delta) / (1 + noise / signal)^2, and in flow matching
    noise / signal is sigma / (1 - sigma).
    """
    match objective.delta_schedule:
        case "constant":
            return torch.full_like(sigmas, objective.delta)
        case "snr":
            return objective.delta + (1 - objective.delta) * (1 - sigmas) ** 2
        case "exponential":
            return objective.delta**sigmas


def error_loss(error: Tensor, sigmas: Tensor, objective: Objective) -> Tensor:
    """The loss of each error e (B, C, h, w), float32: e^2, or with c of `deltas` the pseudo-Huber
    2 c (sqrt(e^2 + c^2) - c), or that over c ("smooth-l1").

    Near 0 the pseudo-Huber is e^2, and so of one size with the others.
    """
    squared = error**2
    if objective.loss == "mse":
        return squared
    delta = _per_sample(deltas(sigmas, objective))
    # sqrt(e^2 + c^2) - c without its cancellation
    beyond = squared / (torch.sqrt(squared + delta**2) + delta)
    return 2 * beyond if objective.loss == "smooth-l1" else 2 * delta * beyond


def per_sample_loss(prediction: Tensor, batch: Batch, objective: Objective) -> Tensor:
    """Weighted loss of the velocity, mean over (C, h, w), per sample: (B,) float32.

    With a mask m it is sum(m e) / sum(m) over the places (h, w), e the mean over C: a sample weighs
    the same however little of it the mask shows.
    """
    velocity = prediction.float()
    if objective.weighting == "diffusers-compat" and objective.loss == "mse":
        values = _script_error(velocity, batch) ** 2
    else:
        error = velocity - velocity_target(batch.latents, batch.noise)
        values = error_loss(error, batch.sigmas, objective)
        if objective.weighting != "none":
            values = _per_sample(loss_weights(batch.sigmas, objective)) * values
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
