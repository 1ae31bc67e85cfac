"""What a batch of a distillation is drawn: all of it a function of (seed, step, slot).

Angles are (B,) float32, noise (B, C, h, w) float32 of unit variance; "guidance" (B,) is a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from attrs import evolve
from torch import Tensor

from compiler.plan import Sprint
from runtime import rng
from runtime.batch import Batch
from runtime.methods.base import is_rivals
from runtime.methods.trigflow import angles_of

NEGATIVE = "negative_"
"""Begins the names of the empty prompt's embedding in a batch's text."""
Normal = Callable[[str], Tensor]
"""Noise of the latents' shape for a purpose."""


def is_students(facts: Sprint, step: int) -> bool:
    """Whether the update after `step` others is the student's."""
    return not (facts.heads and is_rivals(step))


def noises(facts: Sprint, step: int) -> tuple[str, ...]:
    """Which noise the update needs besides the batch's own."""
    if is_students(facts, step):
        judged = ("judged_noise",) if facts.largest_share > 0 else ()
        return (*judged, "fake_noise") if facts.heads else ()
    return ("fake_noise", "real_noise", *(("misaligned_noise",) if facts.misaligned_pairs else ()))


def example(facts: Sprint, batch: Batch, step: int) -> Batch:
    """`batch` with all that an update of this step takes besides, for simulation and measurement:
    the empty prompt is one token."""
    flat, full = torch.full_like(batch.sigmas, 0.5), torch.zeros_like
    names = ["guidance", "angles", "judged_angles", "fake_angles", "misaligned_angles"]
    text = {f"{NEGATIVE}{name}": each[:, :1].clone() for name, each in batch.text.items()}
    return evolve(
        batch,
        text={**batch.text, **text},
        draws={
            **{name: flat.clone() for name in names},
            **{name: full(batch.noise) for name in noises(facts, step)},
        },
    )


def draws(
    facts: Sprint, seed: int, step: int, slots: range, normal: Normal
) -> Mapping[str, Tensor]:
    """What the samples in `slots` of a step are drawn."""
    uniform = rng.uniforms(seed, "sprint-guidance", step, slots)
    scales = torch.tensor(facts.guidance, dtype=torch.float32)
    numbers = torch.from_numpy(uniform * len(scales)).long()

    def angles(purpose: str, mean: float, deviation: float) -> Tensor:
        drawn = torch.cat([rng.normal((1,), seed, purpose, step, slot) for slot in slots])
        return angles_of(drawn, mean, deviation, facts.sigma_data)

    def judged(found: Tensor) -> Tensor:
        """Some of them are the largest angle instead."""
        share = torch.from_numpy(rng.uniforms(seed, "sprint-largest", step, slots))
        return torch.where(share < facts.largest_share, facts.largest_angle, found)

    own = angles("sprint-angle", facts.mean, facts.std)
    made = {"guidance": scales[numbers], "angles": own}
    if facts.heads:
        apart = (facts.discriminator_mean, facts.discriminator_std)
        made["fake_angles"] = angles("sprint-judging", *apart)
        if not is_students(facts, step):
            made["angles"] = judged(own)
            if facts.misaligned_pairs:
                made["misaligned_angles"] = angles("sprint-misaligned", *apart)
        elif facts.largest_share > 0:
            made["judged_angles"] = judged(angles("sprint-judged", facts.mean, facts.std))
    return {**made, **{name: normal(f"sprint-{name}") for name in noises(facts, step)}}
