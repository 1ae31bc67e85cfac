"""TrigFlow: a flow-matching network as one that predicts along an arc, and its consistency loss.

Lu and Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models" (2024, arXiv
2410.11081); Chen et al., "SANA-Sprint" (2025, arXiv 2503.09641), section 3.1 and appendix.

At the angle t from 0 to pi/2, x_t = cos t x0 + sin t z, with z ~ N(0, s^2) and s = sigma_data the
deviation of x0. The network F gives x0 = cos t x_t - sin t s F, and dx_t / dt = s F for a teacher.
Angles, times and losses are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

Flow = Callable[[Tensor, Tensor], Tensor]
"""The velocity n - x0 (B, C, h, w) at (1 - tau) x0 + tau n, of unit variance, and the times tau
(B,)."""
LARGEST = 1.57080  # the angle that SCMScheduler starts from
NORM_FLOOR = 0.1  # c of the tangent's normalisation g / (|g| + c), arXiv 2410.11081, section 4.1


def per_sample(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to go with latents."""
    return values[:, None, None, None]


def flow_time(angles: Tensor) -> Tensor:
    """tau = sin t / (sin t + cos t), (B,): the flow time with the signal-to-noise ratio of t."""
    sine, cosine = torch.sin(angles), torch.cos(angles)
    return sine / (sine + cosine)


def angles_of(normal: Tensor, mean: float, deviation: float, sigma_data: float) -> Tensor:
    """t = atan(exp(mean + deviation n) / s), (B,), from standard normal n: log-normal in tan t."""
    return torch.atan(torch.exp(mean + deviation * normal) / sigma_data)


def noised(latents: Tensor, noise: Tensor, angles: Tensor) -> Tensor:
    """x_t = cos t x0 + sin t z (B, C, h, w); both of deviation sigma_data."""
    t = per_sample(angles)
    return torch.cos(t) * latents + torch.sin(t) * noise


def predict(flow: Flow, inputs: Tensor, angles: Tensor) -> Tensor:
    """F (B, C, h, w) at `inputs` x_t / s and `angles` (B,), from a flow network.

    The network is asked at Y = c x_t / s and tau, c = sqrt(tau^2 + (1 - tau)^2), which puts x_t on
    the flow's own path, and F = ((1 - 2 tau) Y + (1 - 2 tau + 2 tau^2) v) / c.
    """
    times = flow_time(angles)
    tau = per_sample(times)
    scale = torch.sqrt(tau**2 + (1 - tau) ** 2)
    placed = inputs * scale
    velocity = flow(placed, times).to(inputs.dtype)
    return ((1 - 2 * tau) * placed + (1 - 2 * tau + 2 * tau**2) * velocity) / scale


def denoised(noisy: Tensor, prediction: Tensor, angles: Tensor, sigma_data: float) -> Tensor:
    """x0 = cos t x_t - sin t s F."""
    t = per_sample(angles)
    return torch.cos(t) * noisy - torch.sin(t) * sigma_data * prediction


def guided(
    flow: Flow, unconditional: Flow, inputs: Tensor, angles: Tensor, scale: Tensor
) -> Tensor:
    """The teacher's F under classifier-free guidance, `scale` (B,) in float32."""
    without = predict(unconditional, inputs, angles)
    return without + per_sample(scale) * (predict(flow, inputs, angles) - without)


@torch.no_grad()
def forward_derivative(
    flow: Flow, inputs: Tensor, angles: Tensor, input_tangent: Tensor, angle_tangent: Tensor
) -> Tensor:
    """The derivative of `predict` along the tangents, (B, C, h, w), by forward differentiation.

    No kernel of softmax attention has a forward derivative, so that attention is written out here;
    the linear attention, which has one, stays itself. Nothing is checkpointed: no gradient is
    recorded.
    """
    dual: Any = forward_ad
    with dual.dual_level(), explicit_attention():
        result = predict(
            flow, dual.make_dual(inputs, input_tangent), dual.make_dual(angles, angle_tangent)
        )
        tangent: Tensor | None = dual.unpack_dual(result).tangent
    assert tangent is not None, "the network depends on what it is given"
    return tangent


def tangent(
    prediction: Tensor,
    velocity: Tensor,
    derivative: Tensor,
    noisy: Tensor,
    angles: Tensor,
    warmup: float,
    sigma_data: float,
) -> Tensor:
    """The normalised tangent g of the consistency loss, (B, C, h, w).

    -cos^2 t (s F - D) - r (cos t sin t x_t + s J), over its norm per sample plus 0.1: arXiv
    2410.11081, section 4. `velocity` is D = dx_t / dt by the teacher, `derivative` J is
    cos t sin t dF / dt, and r = `warmup` grows from 0 to 1.
    """
    t = per_sample(angles)
    cosine, sine = torch.cos(t), torch.sin(t)
    apart = cosine**2 * (sigma_data * prediction - velocity)
    along = cosine * sine * noisy + sigma_data * derivative
    raw = -apart - warmup * along
    norms = torch.linalg.vector_norm(raw.flatten(1), dim=1)
    return raw / (per_sample(norms) + NORM_FLOOR)


def consistency_loss(
    prediction: Tensor, target: Tensor, logvar: Tensor, angles: Tensor, sigma_data: float
) -> Tensor:
    """mean of w e^-l (F - F' - g)^2 + l per sample, (B,), with w = 1 / (s tan t).

    `target` is F' + g without gradient, `logvar` l (B,) the learned weighting (Karras et al., 2023,
    arXiv 2312.02696, appendix B.2).
    """
    weights = 1 / (torch.tan(angles) * sigma_data)
    errors = ((prediction - target) ** 2).flatten(1).mean(1)
    return weights * torch.exp(-logvar) * errors + logvar


def generator_loss(logits: Tensor) -> Tensor:
    """-mean of the discriminator's logits (B, N) of each sample, (B,)."""
    return -logits.mean(1)


def discriminator_loss(real: Tensor, fakes: list[Tensor]) -> Tensor:
    """Half of the hinge losses of real and of all fake logits, each (B, N): per sample, (B,)."""
    false = torch.stack([F.relu(1 + fake).mean(1) for fake in fakes]).mean(0)
    return (F.relu(1 - real).mean(1) + false) / 2


@contextmanager
def explicit_attention() -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` is its formula in plain operations.

    The function itself is exchanged, as simulation and other kernels exchange it too: what they
    call in its place has no forward derivative either.
    """
    functional: Any = F
    stock = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v, all (B, heads, tokens, channels), of PyTorch's meaning."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value
