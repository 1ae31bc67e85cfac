"""Distilling a teacher into a student of one to four steps: SANA-Sprint (arXiv 2503.09641).

The student learns continuous-time consistency from its frozen teacher (`runtime.methods.trigflow`)
and to please a discriminator, which judges pictures by features of the same teacher. Updates take
turns: even ones are the student's, odd ones the discriminator's.

Everything random is drawn with the batch (`runtime.methods.sprint_draws`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn

from compiler.plan import Precision, Sprint
from runtime import rng
from runtime.batch import Batch
from runtime.families.common import DTYPES, inference
from runtime.families.sana import velocity
from runtime.methods import trigflow
from runtime.methods.base import LOSS, Built, Rival, masters
from runtime.methods.heads import Heads
from runtime.methods.sprint_draws import NEGATIVE, is_students
from runtime.methods.student import make_student
from runtime.modules import blocks_of

BLOCKS = ("transformer_blocks",)


@define(kw_only=True, eq=False)
class Distillation:
    """The three networks, and what an update of either side computes."""

    facts: Sprint
    student: nn.Module
    teacher: nn.Module
    heads: Heads | None  # none: there is no discriminator
    compute: torch.dtype

    @property
    def others(self) -> list[nn.Module]:
        """The networks besides the student."""
        return [self.teacher] if self.heads is None else [self.teacher, self.heads]

    def begin(self, step: int) -> None:
        """To be called before the passes of the update after `step` others."""
        if self.heads is None:
            return
        judging = not is_students(self.facts, step)
        self.heads.requires_grad_(judging)
        if judging:
            self.heads.iterate()

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Per sample, (B,) each: "loss" is what the update minimises, others are its parts."""
        if is_students(self.facts, step):
            return self._students(batch, step)
        return self._discriminators(batch)

    def _students(self, batch: Batch, step: int) -> dict[str, Tensor]:
        facts, draws = self.facts, batch.draws
        latents, noise = batch.latents * facts.sigma_data, batch.noise * facts.sigma_data
        angles = draws["angles"]
        noisy = trigflow.noised(latents, noise, angles)
        consistency, clean = self._consistency(batch, noisy, angles, step)
        if self.heads is None:
            return {LOSS: facts.consistency_weight * consistency}
        if facts.largest_share > 0:
            angles = draws["judged_angles"]
            noisy = trigflow.noised(latents, draws["judged_noise"] * facts.sigma_data, angles)
            prediction = trigflow.predict(self._student(batch), noisy / facts.sigma_data, angles)
            clean = trigflow.denoised(noisy, prediction, angles, facts.sigma_data)
        logits = self._judge(batch, clean, "fake")
        adversarial = trigflow.generator_loss(logits)
        total = facts.consistency_weight * consistency + facts.adversarial_weight * adversarial
        return {
            LOSS: total,
            "consistency_loss": consistency.detach(),
            "adversarial_loss": adversarial.detach(),
        }

    def _consistency(
        self, batch: Batch, noisy: Tensor, angles: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """The consistency loss (B,), and x0 as the student sees it."""
        sigma, flow = self.facts.sigma_data, self._student(batch)
        inputs = noisy / sigma
        with torch.no_grad():
            teacher = self._teacher(batch, batch.text)
            without = self._teacher(batch, _negative(batch.text))
            velocity = sigma * trigflow.guided(
                teacher, without, inputs, angles, batch.draws["guidance"]
            )
            slope = torch.cos(angles) * torch.sin(angles)
            along = trigflow.per_sample(slope) * velocity / sigma
            with inference(self.student):
                derivative = trigflow.forward_derivative(flow, inputs, angles, along, slope)
        prediction = trigflow.predict(flow, inputs, angles)
        fixed = prediction.detach()
        warmup = min(1.0, step / self.facts.tangent_warmup) if self.facts.tangent_warmup else 1.0
        moved = trigflow.tangent(fixed, velocity, derivative, noisy, angles, warmup, sigma)
        logvar = self._logvar(batch, angles)
        loss = trigflow.consistency_loss(prediction, fixed + moved, logvar, angles, sigma)
        return loss, trigflow.denoised(noisy, prediction, angles, sigma)

    def _discriminators(self, batch: Batch) -> dict[str, Tensor]:
        facts, draws = self.facts, batch.draws
        latents, noise = batch.latents * facts.sigma_data, batch.noise * facts.sigma_data
        angles = draws["angles"]
        noisy = trigflow.noised(latents, noise, angles)
        with inference(self.student):
            prediction = trigflow.predict(self._student(batch), noisy / facts.sigma_data, angles)
        clean = trigflow.denoised(noisy, prediction, angles, facts.sigma_data)
        fakes = [self._judge(batch, clean, "fake")]
        real = self._judge(batch, latents, "real")
        if facts.misaligned_pairs and latents.shape[0] > 1:
            fakes.append(self._judge(batch, latents.roll(1, 0), "misaligned"))
        loss = trigflow.discriminator_loss(real, fakes)
        return {
            LOSS: loss,
            "real_logits": real.detach().mean(1),
            "fake_logits": fakes[0].detach().mean(1),
        }

    def _judge(self, batch: Batch, clean: Tensor, kind: str) -> Tensor:
        """Logits (B, N) of pictures `clean`, noised anew as was drawn for `kind`."""
        assert self.heads is not None
        angles = batch.draws["fake_angles" if kind == "real" else f"{kind}_angles"]
        noise = batch.draws[f"{kind}_noise"] * self.facts.sigma_data
        inputs = trigflow.noised(clean, noise, angles) / self.facts.sigma_data
        seen: dict[int, Tensor] = {}
        with (
            _listening(self.teacher, self.facts.heads, seen),
            torch.set_grad_enabled(clean.requires_grad),
        ):
            trigflow.predict(self._teacher(batch, batch.text), inputs, angles)
        logits: Tensor = self.heads([seen[number] for number in self.facts.heads])
        return logits

    def _teacher(self, batch: Batch, text: Mapping[str, Tensor]) -> trigflow.Flow:
        given = self._cast(text)

        def flow(noisy: Tensor, times: Tensor) -> Tensor:
            times = times * self.facts.teacher_time
            return velocity(self.teacher, noisy.to(self.compute), times, given)

        return flow

    def _student(self, batch: Batch) -> trigflow.Flow:
        given, guidance = self._cast(batch.text), self._guidance(batch)

        def flow(noisy: Tensor, times: Tensor) -> Tensor:
            return velocity(self.student, noisy.to(self.compute), times, given, guidance)

        return flow

    def _guidance(self, batch: Batch) -> Tensor:
        return batch.draws["guidance"] * self.facts.guidance_embeds_scale

    def _logvar(self, batch: Batch, angles: Tensor) -> Tensor:
        """l (B,) float32, from the embedding of time and guidance that the network itself uses."""
        student: Any = self.student
        times = trigflow.flow_time(angles)
        _, embedded = student.time_embed(
            times, guidance=self._guidance(batch), hidden_dtype=self.compute
        )
        logvar: Tensor = student.logvar_linear(embedded)
        return logvar[:, 0].float()

    def _cast(self, text: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.compute) if v.is_floating_point() else v for k, v in text.items()}


def _negative(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The empty prompt's embedding, by the names that the network takes."""
    return {k.removeprefix(NEGATIVE): v for k, v in text.items() if k.startswith(NEGATIVE)}


@contextmanager
def _listening(
    model: nn.Module, numbers: tuple[int, ...], seen: dict[int, Tensor]
) -> Iterator[None]:
    """Inside, the outputs of these blocks of `model` are put into `seen`."""
    blocks = blocks_of(model, BLOCKS)

    def listener(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[number] = output

        return hook

    handles = [blocks[number].register_forward_hook(listener(number)) for number in numbers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prepare(
    student: nn.Module, teacher: nn.Module, facts: Sprint, precision: Precision, seed: int
) -> Built:
    """Make a student of `student`, loaded in `precision.trained`, and heads on `teacher`'s blocks.

    Both begin as the same network; the teacher is frozen, in `precision.compute`.
    """
    compute, trained = DTYPES[precision.compute], DTYPES[precision.trained]
    count = sum(p.numel() for p in student.parameters())
    make_student(student, facts, seed)
    teacher.eval().requires_grad_(False)
    student.requires_grad_(True)
    loaded = {name: p.detach() for name, p in student.named_parameters()}
    owned = masters(student.to(compute), loaded)
    heads = _heads(student, facts, seed).to(trained) if facts.heads else None
    method = Distillation(
        facts=facts, student=student, teacher=teacher, heads=heads, compute=compute
    )
    return Built(
        model=student,
        trainable=owned,
        parameters=count,
        adapted_modules=0,
        method=method,
        rival=None
        if heads is None
        else Rival(trainable=dict(heads.named_parameters()), buffers=dict(heads.named_buffers())),
    )


def _heads(student: nn.Module, facts: Sprint, seed: int) -> Heads:
    """Fresh ones, as wide as the network, on its device."""
    network: Any = student
    channels = network.time_embed.linear.in_features
    device = network.time_embed.linear.weight.device
    if device.type == "meta":
        with device:
            return Heads(channels, len(facts.heads))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(rng.key(seed, "heads") % (1 << 63))
        return Heads(channels, len(facts.heads)).to(device)
