"""What the model learns: noise levels, noising, target and loss of flow matching.

Notation: latents x, noise n, noise level sigma in (0, 1]; z = (1 - sigma) x + sigma n; the model
predicts the velocity v = n - x (Esser et al., "Scaling Rectified Flow Transformers", 2024,
arXiv 2403.03206). Noise levels lie on the table of T = 1000 that the schedulers use at inference:
s_i = (T - i) / T, sigma_i = shift s_i / (1 + (shift - 1) s_i), i = floor(T u). So u near 0 is pure
noise: the direction of Diffusers' training scripts, the reverse of the paper's.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compiler.plan import Objective
from runtime.batch import Batch

TIMESTEPS = 1000
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
_quantile = NormalDist().inv_cdf


def draw_uniform(objective: Objective, v: NDArray[np.float64]) -> Tensor:
    """u in [0, 1) of the objective's density, float32, from uniform `v` in [0, 1) of one shape.

    Section 3.1 of the paper: logit-normal is the logistic function of N(mean, std), here of its
    quantile at v; mode is 1 - v - scale (cos^2(pi v / 2) - 1 + v); cosmap is
    1 - 1 / (tan(pi v / 2) + 1).
    """
    match objective.sampling:
        case "uniform":
            u = v
        case "logit-normal":
            quantiles = np.array([_quantile(max(each, 2.0**-54)) for each in v])
            normal = quantiles * objective.logit_std + objective.logit_mean
            u = np.exp(-np.logaddexp(0.0, -normal))  # the logistic function, without overflow
        case "mode":
            u = 1 - v - objective.mode_scale * (np.cos(np.pi * v / 2) ** 2 - 1 + v)
        case "cosmap":
            u = 1 - 1 / (np.tan(np.pi * v / 2) + 1)
    return torch.from_numpy(u.astype(np.float32)).clamp(0.0, BELOW_ONE)


def sigmas_from_uniform(u: Tensor, objective: Objective) -> Tensor:
    """Noise levels (B,) float32 for `u` (B,) in [0, 1]; u = 1 is the last entry of the table."""
    index = (u * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)
    unshifted = (TIMESTEPS - index).float() / TIMESTEPS
    shift = objective.shift
    return shift * unshifted / (1 + (shift - 1) * unshifted)


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """z = (1 - sigma) x + sigma n, all in float32: a rounded sigma would not be the time's."""
    levels = _per_sample(sigmas)
    return (1.0 - levels) * latents + levels * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """n - x."""
    return noise - latents


def loss_weights(sigmas: Tensor, objective: Objective) -> Tensor:
    """Weights (B,) of the squared velocity error, float32.

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


def per_sample_loss(prediction: Tensor, batch: Batch, objective: Objective) -> Tensor:
    """Weighted squared error of the velocity, mean over (C, h, w), per sample: (B,) float32.

    With a mask m it is sum(m e) / sum(m) over the places (h, w), e the mean over C: a sample weighs
    the same however little of it the mask shows.
    """
    velocity = prediction.float()
    if objective.weighting == "diffusers-compat":
        squared = _script_error(velocity, batch) ** 2
    else:
        squared = (velocity - velocity_target(batch.latents, batch.noise)) ** 2
        if objective.weighting != "none":
            squared = _per_sample(loss_weights(batch.sigmas, objective)) * squared
    if batch.mask is not None:
        squared = batch.mask * squared
    if batch.weights is not None:
        squared = _per_sample(batch.weights) * squared
    return squared.flatten(1).mean(1)


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
