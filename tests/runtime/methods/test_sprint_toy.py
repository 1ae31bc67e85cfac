"""Consistency distillation where the teacher is known exactly: mixtures of normal distributions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from runtime.methods import trigflow

SIGMA = 0.5
SPREAD = 0.15  # of each component
CENTRES = {
    1: [[-1.2], [0.4], [1.1]],
    2: [[math.cos(k * math.tau / 5), math.sin(k * math.tau / 5)] for k in range(5)],
}
STEPS = {1: 700, 2: 300}  # by dimensions
BATCH, LR = 256, 2e-3


class Teacher:
    """The exact velocity E[n - x0 | z] of z = (1 - tau) x0 + tau n, x0 a mixture."""

    def __init__(self, dimensions: int) -> None:
        centres = torch.tensor(CENTRES[dimensions])
        deviation = math.sqrt((centres.pow(2).mean() - centres.mean() ** 2).item() + SPREAD**2)
        self.centres = (centres - centres.mean(0)) / deviation  # of unit variance altogether
        self.spread = SPREAD / deviation

    def sample(self, count: int) -> Tensor:
        """(count, D, 1, 1)."""
        chosen = self.centres[torch.randint(len(self.centres), (count,))]
        return (chosen + self.spread * torch.randn_like(chosen))[..., None, None]

    def __call__(self, noisy: Tensor, times: Tensor) -> Tensor:
        z, tau = noisy.flatten(1)[:, None], times[:, None, None]  # (B, 1, D), (B, 1, 1)
        means = (1 - tau) * self.centres
        variance = (1 - tau) ** 2 * self.spread**2 + tau**2
        shares = torch.softmax(-((z - means) ** 2).sum(2) / (2 * variance[..., 0]), 1)[..., None]
        gain = (1 - tau) * self.spread**2 / variance
        clean = (shares * (self.centres + gain * (z - means))).sum(1)
        noise = (shares * (tau * (z - means) / variance)).sum(1)
        return (noise - clean)[..., None, None]


class Student(nn.Module):
    """The teacher and a correction that starts at zero."""

    def __init__(self, teacher: Teacher, dimensions: int) -> None:
        super().__init__()
        self.teacher = teacher
        width = 128
        self.layers = nn.Sequential(
            nn.Linear(dimensions + 3, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dimensions),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        self.logvar = nn.Linear(3, 1)

    def _told(self, times: Tensor) -> Tensor:
        return torch.stack((times, torch.sin(3 * times), torch.cos(3 * times)), 1)

    def forward(self, noisy: Tensor, times: Tensor) -> Tensor:
        told = torch.cat((noisy.flatten(1), self._told(times)), 1)
        return self.teacher(noisy, times) + self.layers(told)[..., None, None]

    def weighting(self, times: Tensor) -> Tensor:
        found: Tensor = self.logvar(self._told(times))[:, 0]
        return found


def in_one_step(flow: trigflow.Flow, noise: Tensor) -> Tensor:
    """Samples (B, D) of unit variance from standard normal noise."""
    angles = torch.full(noise.shape[:1], trigflow.LARGEST)
    found = trigflow.denoised(SIGMA * noise, trigflow.predict(flow, noise, angles), angles, SIGMA)
    return (found / SIGMA).flatten(1)


def in_many_steps(teacher: Teacher, noise: Tensor, steps: int = 100) -> Tensor:
    """The teacher's, by Heun's method along its own flow."""
    z, times = noise, torch.linspace(1, 0.002, steps + 1)
    for now, then in itertools.pairwise(times):
        slope = teacher(z, now.expand(len(z)))
        ahead = z + (then - now) * slope
        z = z + (then - now) * (slope + teacher(ahead, then.expand(len(z)))) / 2
    return z.flatten(1)


def sliced_wasserstein(one: Tensor, other: Tensor) -> float:
    """Mean over directions of the 1-Wasserstein distance of projections; exact in one dimension."""
    angles = torch.arange(32) * math.pi / 32
    lines = torch.stack((angles.cos(), angles.sin())) if one.shape[1] == 2 else torch.ones(1, 1)
    sides = [(each @ lines).sort(0).values for each in (one, other)]
    return (sides[0] - sides[1]).abs().mean().item()


def distil(student: Student, teacher: Teacher, steps: int) -> None:
    """The student's updates, without discriminator and guidance."""
    optimizer = torch.optim.Adam(student.parameters(), lr=LR, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / steps)
        clean = SIGMA * teacher.sample(BATCH)
        noise = SIGMA * torch.randn_like(clean)
        angles = trigflow.angles_of(torch.randn(BATCH), 0.2, 1.6, SIGMA)
        noisy = trigflow.noised(clean, noise, angles)
        inputs = noisy / SIGMA
        with torch.no_grad():
            velocity = SIGMA * trigflow.predict(teacher, inputs, angles)
            slope = torch.cos(angles) * torch.sin(angles)
            along = trigflow.per_sample(slope) * velocity / SIGMA
        derivative = trigflow.forward_derivative(student, inputs, angles, along, slope)
        found = trigflow.predict(student, inputs, angles)
        fixed, warmup = found.detach(), min(1.0, step / 200)
        moved = trigflow.tangent(fixed, velocity, derivative, noisy, angles, warmup, SIGMA)
        logvar = student.weighting(trigflow.flow_time(angles))
        trigflow.consistency_loss(found, fixed + moved, logvar, angles, SIGMA).mean().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [1, 2])
def test_one_step_draws_what_many_steps_draw(dimensions: int) -> None:
    """Sliced Wasserstein distance to the teacher's samples from the same noise distribution: the
    untrained student draws the mean of all data; the distilled one is several times nearer."""
    torch.manual_seed(0)
    teacher = Teacher(dimensions)
    student = Student(teacher, dimensions)
    noise, other = torch.randn(2, 4000, dimensions, 1, 1)
    with torch.no_grad():
        wanted, again = in_many_steps(teacher, noise), in_many_steps(teacher, other)
        floor = sliced_wasserstein(wanted, again)  # of two samples of one distribution
        before = sliced_wasserstein(in_one_step(student, other), wanted)
    distil(student, teacher, STEPS[dimensions])
    with torch.no_grad():
        after = sliced_wasserstein(in_one_step(student, other), wanted)
    print(f"{dimensions}-d: {before:.3f} before, {after:.3f} after, {floor:.3f} at best")
    assert before > 0.5
    assert after < 0.25 * before
