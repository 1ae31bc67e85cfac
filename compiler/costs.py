"""What a plan costs on one machine: disk space and time. Estimates, and they say of what kind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from compiler.adapters import OF_THE_BASE
from compiler.data.manifest import Manifest
from compiler.data.prompts import Prompt, prompts_of
from compiler.data.stages import stages, steps_in
from compiler.devices import peak_flops
from compiler.families import FAMILIES
from compiler.keeping import at_once, waiting
from compiler.machine import Machine
from compiler.occasions import evaluation_steps, validation_steps
from compiler.optimizers import saved_bytes
from compiler.plan import Bucket, Dtype, HeldOut, Plan, digest_of, plain
from compiler.site import Present, Site, Space

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
ENTRY = 640
"""Bytes of a cache entry besides its numbers: its part of a shard's header (a key of 64 digits,
name, shape and offsets of each tensor), and its row and its file's hash in the index."""
TENSOR = 1280
"""Bytes of a tensor in a checkpoint besides its numbers: safetensors' header, torch.save's records
of its states, each aligned to 64 bytes."""
TENSORS_OF_A_MODEL = 1000  # of a transformer with 20 to 60 blocks
EXTRA_TOKENS = 4  # that an encoder puts around a prompt, at most

UTILISATION = {"cuda": 0.35, "mps": 0.3, "xpu": 0.3, "cpu": 0.25}
"""Share of the peak that a training step reaches, assumed until a run has measured it. Eager
PyTorch with checkpointing reaches a third to two fifths on CUDA devices of 2020 to 2024."""

NOTED = 1.05
"""The least overhead (see `plan.Memory.overhead`) that is told of."""

Basis = Literal["same-step", "same-device", "data-sheet", "nominal"]


@frozen(kw_only=True)
class Disk:
    """Bytes; None where the model was not simulated, or nobody looked."""

    latents_bytes: int
    texts_bytes: int  # at most: a prompt of unknown length counts as one of full length
    checkpoints: int  # complete ones that lie there at once, at most
    one_checkpoint_bytes: int | None
    result_bytes: int | None
    pictures_bytes: int  # at most: as many bytes as the pictures have values
    free_bytes: int | None  # where the run folder is
    cache_free_bytes: int | None

    @property
    def cache_bytes(self) -> int:
        """All latents and embeddings of the run."""
        return self.latents_bytes + self.texts_bytes

    @property
    def checkpoint_bytes(self) -> int | None:
        """All checkpoints that lie there at once."""
        one = self.one_checkpoint_bytes
        return None if one is None else self.checkpoints * one


@frozen(kw_only=True)
class Duration:
    """Seconds of training, by all devices, and of drawing, which one does; caching and loading are
    not in it."""

    train_seconds: float
    validate_seconds: float  # pictures and evaluation losses
    seconds_per_step: float  # mean over all buckets
    flops_per_second: float  # of each device
    basis: Basis
    why: str  # a sentence on where the rate is from


@frozen(kw_only=True)
class Skipped:
    """Images of one source that are left out, for one reason."""

    source: str
    images: int
    why: str


@frozen(kw_only=True)
class Hidden:
    """Files and folders of one data folder that begin with a dot and are left alone."""

    source: str
    count: int
    names: tuple[str, ...]  # of the first of them


@frozen(kw_only=True)
class Outlook:
    """What a plan costs here and now. No part of the plan, because it changes with the disk."""

    skipped: tuple[Skipped, ...] = ()
    hidden: tuple[Hidden, ...] = ()
    disk: Disk
    duration: Duration | None  # None: nothing was simulated, or the device's rate is unknown
    unknown: str  # why there is no duration; "" if there is one
    present: Present | None
    steps: int  # of the whole run

    @property
    def left_seconds(self) -> float | None:
        """What is left of the time for a run that has begun."""
        if self.duration is None:
            return None
        whole = self.duration.train_seconds + self.duration.validate_seconds
        resume = self.present.resume if self.present else None
        if resume is None or resume.changes or resume.problem:
            return whole
        return 0.0 if resume.finished else whole * (1 - resume.step / self.steps)


def outlook(plan: Plan, manifest: Manifest, machine: Machine, site: Site | None) -> Outlook:
    """All costs of `plan`. Without a `site`, what a machine would have to be asked stays open."""
    duration, unknown = _duration(plan, machine, site)
    return Outlook(
        disk=disk(
            plan,
            manifest,
            site.space(plan.run_folder) if site else None,
            site.space(plan.cache_folder) if site else None,
        ),
        duration=duration,
        unknown=unknown,
        present=site.present(plan, manifest) if site else None,
        steps=plan.steps.total,
    )


def disk(plan: Plan, manifest: Manifest, run: Space | None, cache: Space | None) -> Disk:
    """What a whole run writes, from nothing."""
    return Disk(
        latents_bytes=latents_bytes(plan),
        texts_bytes=texts_bytes(plan, prompts_of(plan, manifest)),
        checkpoints=kept(plan),
        one_checkpoint_bytes=one_checkpoint_bytes(plan),
        result_bytes=result_bytes(plan),
        pictures_bytes=len(validation_steps(plan)) * _pixels_drawn(plan) * 3,
        free_bytes=run.free_bytes if run else None,
        cache_free_bytes=cache.free_bytes if cache else None,
    )


def latents_bytes(plan: Plan) -> int:
    """Cached latents of all pictures, held-out ones too: channels x height x width of each moment,
    and the entry."""
    card = FAMILIES[plan.model.family]
    vae = _config(plan, "vae")
    factor, channels = card.vae_factor(vae), int(vae[card.latent_channels_key])
    groups: list[Bucket | HeldOut] = [*plan.buckets]
    groups += plan.evaluation.groups if plan.evaluation else ()
    values = sum(b.images * (b.width // factor) * (b.height // factor) for b in groups)
    images = sum(each.images for each in groups)
    return values * channels * len(card.moments) * BYTES[plan.precision.cache] + images * ENTRY


def texts_bytes(plan: Plan, prompts: Iterable[Prompt]) -> int:
    """Cached embeddings of `prompts`, at most.

    Where a family keeps only a prompt's own tokens, there are no more of them than bytes in the
    text (every token stands for at least one) and than the plan's length.
    """
    card = FAMILIES[plan.model.family]
    configs = {name: json.loads(text) for name, text in plan.model.configs.items()}
    shapes = card.embedding_shapes(configs, plan.text.max_length).values()
    size, total = BYTES[plan.precision.cache], 0
    for prompt in prompts:
        tokens = len(prompt.text.lower().encode("utf-8", "surrogatepass")) + EXTRA_TOKENS
        for shape in shapes:
            rows = min(shape[0], tokens) if card.unpadded_text and len(shape) == 2 else shape[0]
            total += rows * prod(shape[1:]) * size
        total += ENTRY
    return total


def kept(plan: Plan) -> int:
    """Complete checkpoints that lie there at once: a new one is written before an old one goes."""
    return at_once(plan.checkpoints, plan.steps.total, waiting(plan))


def one_checkpoint_bytes(plan: Plan) -> int | None:
    """Trained weights, their average (float32 or wider) and the optimizer's states."""
    trainable = trained_parameters(plan)
    if trainable is None:
        return None
    size = BYTES[plan.precision.trained]
    ema = trainable * max(4, size) if plan.ema else 0
    both = trainable + heads_parameters(plan)
    states = saved_bytes(plan.optimizer.name, plan.precision.trained, both)
    return both * size + ema + states + TENSOR * _trained_tensors(plan)


def heads_parameters(plan: Plan) -> int:
    """Of a distillation's discriminator: convolutions one, nine and one token wide, each of the
    first two with a norm. `runtime.methods.heads` has the layers."""
    if plan.sprint is None:
        return 0
    config = json.loads(plan.model.configs[plan.model.trained_component])
    wide = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    return len(plan.sprint.heads) * (10 * wide**2 + 7 * wide + 1)


def result_bytes(plan: Plan) -> int | None:
    """The adapter's file, or the whole pipeline; with an average, that is saved, or both are."""
    trainable = trained_parameters(plan)
    if trainable is None:
        return None
    size = BYTES[plan.precision.trained]
    trained = trainable * (max(4, size) if plan.ema else size)
    if plan.ema and plan.ema.save == "both":
        trained += trainable * size
    if plan.adapter is not None:  # with what it took over from the base, of the same size
        return trained * (2 if plan.adapter.init in OF_THE_BASE else 1)
    return trained + sum(
        _component_bytes(plan, part.name, part.parameters * BYTES[part.dtype])
        for part in plan.model.components
        if not part.trained
    )


def trained_parameters(plan: Plan) -> int | None:
    """Parameters that the optimizer updates; None for an adapter that was not simulated."""
    counted = plan.memory.counts.get("trainable")
    if counted is not None or plan.adapter is not None:
        return counted
    return sum(part.parameters for part in plan.model.components if part.trained)


def _component_bytes(plan: Plan, name: str, otherwise: int) -> int:
    """Bytes of the files of a local component; `otherwise` of one on the hub."""
    if any(part.name == name and part.file for part in plan.model.components):
        return otherwise  # a part of a file
    folder = Path(plan.model.base) / name
    if not plan.model.local or not folder.is_dir():
        return otherwise
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _trained_tensors(plan: Plan) -> int:
    """Two matrices a layer of an adapter; a few dozen a block of a whole model."""
    return 2 * plan.memory.counts.get("adapted", 0) or TENSORS_OF_A_MODEL


def _pixels_drawn(plan: Plan) -> int:
    """Pixels of one validation."""
    shown = plan.validation
    area = sum(width * height for width, height in shown.sizes)
    return len(shown.prompts) * len(shown.seeds) * area


def _config(plan: Plan, name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(plan.model.configs[name])
    return config


def train_flops(plan: Plan) -> float:
    """Floating-point operations of all steps; 0 where nothing was simulated.

    The simulated step, at the bucket with the most pixels in a batch, scaled by pixels. What does
    not grow with them (text tokens) or grows faster (attention) makes this an estimate where
    buckets differ in size. Samples that learn what the base predicts take a forward pass more.
    """
    drawn, more = 0.0, forward_share(plan)
    passes = {s.id: 1 + (more if s.target == "base" else 0) for s in plan.sources}
    every = stages(plan.steps, plan.sources)
    for stage, count in zip(every, steps_in(every, plan.steps.total), strict=True):
        there = [b for b in plan.buckets if b.source in stage.sources]
        pixels = sum(b.samples * b.width * b.height * passes[b.source] for b in there)
        drawn += pixels * count / max(stage.per_epoch, 1)
    return _flops_per_pixel(plan) * drawn


def _flops_per_pixel(plan: Plan) -> float:
    most = max(b.width * b.height * min(b.batch_size, b.samples) for b in plan.buckets)
    return plan.memory.counts.get("flops", 0) / most


def forward_share(plan: Plan) -> float:
    """The forward pass as a share of the simulated step.

    A backward pass costs as much again for the gradients of what is between the layers, and once
    more for those of the weights, if these are trained; what is recomputed is added.
    """
    interval = plan.memory.layout.activation_checkpointing
    return 1 / ((2 if plan.adapter else 3) + (1 / interval if interval else 0))


def validate_flops(plan: Plan) -> float:
    """Floating-point operations of all validation pictures, without decoding: each sampling step
    is a forward pass, two with guidance that the model is not told; and of all evaluation losses.
    """
    card, config = FAMILIES[plan.model.family], _config(plan, plan.model.trained_component)
    told = plan.sprint is not None or card.told_guidance(config)
    twice = plan.validation.guidance > 1 and not told
    passes = plan.validation.steps * (2 if twice else 1)
    pixels = len(validation_steps(plan)) * _pixels_drawn(plan)
    drawn = passes * pixels
    return _flops_per_pixel(plan) * forward_share(plan) * (drawn + _pixels_judged(plan))


def _pixels_judged(plan: Plan) -> int:
    """Pixels of all forward passes for evaluation losses."""
    if plan.evaluation is None:
        return 0
    pixels = sum(each.images * each.width * each.height for each in plan.evaluation.groups)
    return len(evaluation_steps(plan)) * len(plan.evaluation.timesteps) * pixels


def step_key(plan: Plan, device_name: str) -> str:
    """Names the step that `plan` repeats, on this device: runs of one key are equally fast."""
    names = ("model", "adapter", "precision", "text", "ema", "threads")
    parts = {name: value for name, value in plain(plan).items() if name in names}
    shapes = {(b.width, b.height, min(b.batch_size, b.samples)) for b in plan.buckets}
    optimizer = [plan.optimizer.name, plan.optimizer.fused]
    parted = [plan.steps.accumulate, plan.steps.micro_batch]
    layout = plain(plan.memory.layout)
    found = [device_name, parts, sorted(shapes), optimizer, layout, parted]
    shared = [plan.steps.ranks, plan.sharing.strategy] if plan.steps.ranks > 1 else []
    return digest_of([*found, *shared])


def device_key(plan: Plan, device_name: str) -> str:
    """Names what decides how much of its peak a device reaches, roughly."""
    kind = plan.adapter.kind if plan.adapter else "full"
    parts = [device_name, plan.model.family, kind, plan.precision.compute]
    return digest_of([*parts, plan.threads if plan.device == "cpu" else 0])


def _duration(plan: Plan, machine: Machine, site: Site | None) -> tuple[Duration | None, str]:
    flops = train_flops(plan)
    if not flops:
        return None, "the step was not simulated"
    if plan.device not in ("cpu", machine.device):
        return None, f"there is no {plan.device} device here to ask"
    rate = _rate(plan, machine, site)
    if rate is None:
        return None, f"the rate of {machine.device_name} is not known; a first run measures it"
    speed, basis, why = rate
    if basis == "data-sheet":
        speed /= plan.memory.overhead
        if plan.memory.overhead >= NOTED:
            why += f", {plan.memory.overhead:.3g} times as long with all that is moved"
    training = flops / plan.steps.ranks / speed
    duration = Duration(
        train_seconds=training,
        validate_seconds=validate_flops(plan) / speed,
        seconds_per_step=training / plan.steps.total,
        flops_per_second=speed,
        basis=basis,
        why=why,
    )
    return duration, ""


def _rate(plan: Plan, machine: Machine, site: Site | None) -> tuple[float, Basis, str] | None:
    """Operations a second, from the best source there is."""
    name = device_name(plan.device, machine)
    same = site.speed(step_key(plan, name)) if site else None
    if same is not None:
        return same.flops_per_second, "same-step", f"measured here, {same.steps:,} such steps"
    like = site.speed(device_key(plan, name)) if site else None
    if like is not None:
        return like.flops_per_second, "same-device", "measured here, in a run of another shape"
    share = UTILISATION[plan.device]
    if plan.device == "cpu":
        peak = machine.processor_flops * plan.threads
        why = f"{share:.0%} of the processor's nominal {peak / 1e9:,.0f} GFLOP/s assumed"
        return (share * peak, "nominal", why) if peak else None
    sheet = peak_flops(name, plan.precision.compute)
    if sheet is None:
        return None
    why = f"{share:.0%} of {sheet / 1e12:,.0f} TFLOP/s (data sheet) assumed"
    return share * sheet, "data-sheet", why


def device_name(device: str, machine: Machine) -> str:
    """What a plan's device is called among what was measured."""
    return "cpu" if device == "cpu" else machine.device_name
