"""From a Sana network to a student that is told the guidance scale, and takes times from 0 to 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.plan import Sprint
from runtime import rng

OF_LOSS = "logvar_linear"  # begins the names of what no pipeline reads
GUIDANCE_DEVIATION = 0.02  # of the guidance embedder's first layer; its second one starts at zero
GRID = 4001  # times at which an embedding is fitted
SLOPE = 4.0  # of a unit's rise; steeper ones follow the teacher's own roughness in time
REACH = 0.05  # how far beyond 0 and 1 the units' knots lie
RIDGE_IN, RIDGE_OUT = 1e-3, 1e-3  # small weights: training starts from them


@torch.no_grad()
def make_student(network: nn.Module, facts: Sprint, seed: int) -> None:
    """Turn a teacher's network (in place) into a student that starts as the same function.

    It gets an embedding of the guidance scale, which starts at zero in its last layer alone: were
    all of it zero, nothing but that layer's bias would ever have a gradient. It gets
    `logvar_linear`, the learned weighting of the loss, which no pipeline reads. Where the teacher
    takes times up to another `facts.teacher_time` than 1, the student's embedding of times is
    fitted, since the pipeline of few-step models hands over times up to 1.
    """
    from diffusers.models.transformers.sana_transformer import (
        SanaCombinedTimestepGuidanceEmbeddings,
    )

    transformer: Any = network
    old = transformer.time_embed
    weight = old.linear.weight
    width = weight.shape[1]
    with torch.device("meta"):
        new = SanaCombinedTimestepGuidanceEmbeddings(width)
        logvar = nn.Linear(width, 1)
    for part in (new.guidance_embedder, logvar):
        part.to_empty(device=weight.device).to(weight.dtype)
    new.timestep_embedder, new.linear = old.emb.timestep_embedder, old.linear
    if not weight.is_meta:
        if facts.teacher_time != 1.0:
            fit_times(new.timestep_embedder, new.time_proj, facts.teacher_time)
        _start(new.guidance_embedder, logvar, seed)
    transformer.time_embed = new
    transformer.logvar_linear = logvar
    transformer.register_to_config(**settings_of(facts))


def settings_of(facts: Sprint) -> dict[str, Any]:
    """What a student's configuration says otherwise than its teacher's."""
    return {
        "guidance_embeds": True,
        "guidance_embeds_scale": facts.guidance_embeds_scale,
        "timestep_scale": 1.0,
    }


def _start(guidance: Any, logvar: nn.Linear, seed: int) -> None:
    first = guidance.linear_1.weight
    first.copy_(GUIDANCE_DEVIATION * rng.normal(tuple(first.shape), seed, "guidance"))
    for zero in (guidance.linear_1.bias, guidance.linear_2.weight, guidance.linear_2.bias):
        zero.zero_()
    bound = math.sqrt(6 / (1 + logvar.in_features))  # Glorot and Bengio, 2010, equation 16
    drawn = [
        rng.uniform(seed, "logvar", place) * 2 * bound - bound
        for place in range(logvar.in_features)
    ]
    logvar.weight.copy_(torch.tensor([drawn]))
    logvar.bias.zero_()


@torch.no_grad()
def fit_times(embedder: Any, sinusoids: nn.Module, factor: float) -> float:
    """Make `embedder` give at tau (0 to 1) about what it gave at `factor` tau.

    At times up to 1 the sinusoids hardly turn, so both layers are set anew: the units of the first
    one rise or fall, one after the other, along tau, and the second one is fitted to the teacher's
    embedding by least squares. It is smoother in time than the teacher's, which consistency needs
    (arXiv 2410.11081, section 4.1). Returns the share of the embedding's change that is lost (the
    root mean square of the error over that of the embedding without its mean).
    """
    first, second = embedder.linear_1, embedder.linear_2
    device, dtype = first.weight.device, first.weight.dtype
    tau = torch.linspace(0, 1, GRID, dtype=torch.float64)

    def at(times: Tensor) -> Tensor:
        """The embedder's input (GRID, 256), float64 on the host."""
        found: Tensor = sinusoids(times.float())
        return found.double()

    wanted = embedder(at(factor * tau).to(device, dtype)).cpu().double()
    inputs = at(tau)
    line = _least_squares(inputs, tau[:, None], RIDGE_IN)
    units = first.weight.shape[0]
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(-(-units // 2))[:units]
    knots = torch.linspace(-REACH, 1 + REACH, units, dtype=torch.float64)
    weight = SLOPE * signs[:, None] * line[:-1, 0]
    bias = SLOPE * signs * (line[-1, 0] - knots)
    hidden = F.silu(inputs @ weight.T + bias)
    out = _least_squares(hidden, wanted, RIDGE_OUT)
    first.weight.copy_(weight)
    first.bias.copy_(bias)
    second.weight.copy_(out[:-1].T)
    second.bias.copy_(out[-1])
    found = embedder(inputs.to(device, dtype)).cpu().double()
    lost = (found - wanted).norm() / (wanted - wanted.mean(0)).norm().clamp(min=1e-12)
    return float(lost)


def _least_squares(inputs: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """Weights, and below them the constant: (columns + 1, wanted's columns)."""
    rows = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
    gram = rows.T @ rows / len(rows) + ridge * torch.eye(rows.shape[1], dtype=rows.dtype)
    solved: Tensor = torch.linalg.solve(gram, rows.T @ wanted / len(rows))
    return solved
