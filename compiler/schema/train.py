"""How it is trained: optimizer, schedule, timesteps, loss, noise, average, guard, distillation."""

from __future__ import annotations

from typing import Annotated, Literal

from attrs import field, frozen

from compiler.schema.ranges import (
    Auto,
    BatchSize,
    Beta,
    Mean,
    NonNegativeFloat,
    PositiveFloat,
    Probability,
    Shift,
)
from compiler.structure import Length, Range
from compiler.units import Interval, Share


@frozen(kw_only=True)
class OptimizerRecipe:
    """The optimizer. Each takes some of the keys below; the reference lists which, and its own
    defaults."""

    name: str = "auto"
    """A name of the optimizer table. "auto": adamw, or what keeps less state if memory needs it."""
    lr: PositiveFloat
    """Learning rate."""
    betas: Annotated[tuple[Beta, ...], Length(ge=2, le=3)] | None = None
    """Decay of the moment estimates."""
    eps: PositiveFloat | None = None
    """Added to the denominator."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay; decoupled from the gradient, except in "adam", "adagrad" and "sgd"."""
    momentum: Beta | None = None
    """Share of the last update that is added to the next."""
    nesterov: bool | None = None
    """Look one update ahead (Nesterov's momentum)."""
    lr_decay: NonNegativeFloat | None = None
    """Of "adagrad": the learning rate falls as 1 / (1 + lr_decay x step)."""
    beta2_decay: Annotated[float, Range(ge=-1, lt=0)] | None = None
    """Of "adafactor": the second moment's decay is 1 - step^beta2_decay."""
    clip_threshold: PositiveFloat | None = None
    """Of "adafactor" and "came": root mean square of a weight's update at most."""
    ns_steps: Annotated[int, Range(ge=1, le=99)] | None = None
    """Of "muon": Newton-Schulz iterations."""
    k: Annotated[int, Range(ge=1, le=1_000_000)] | None = None
    """Of "ranger": steps between two looks ahead."""
    alpha: NonNegativeFloat | None = None
    """Of "ranger": share of the look ahead. Of "ademamix": weight of the slow average."""
    t_alpha_beta3: Annotated[int, Range(ge=1, le=100_000_000)] | None = None
    """Of "ademamix": steps over which the slow average is brought in."""
    t_alpha: Annotated[int, Range(ge=1, le=100_000_000)] | None = None
    """Of "bnb-ademamix": steps over which the slow average's weight rises."""
    t_beta3: Annotated[int, Range(ge=1, le=100_000_000)] | None = None
    """Of "bnb-ademamix": steps over which the slow average becomes slow."""
    r: NonNegativeFloat | None = None
    """Of schedule-free ones: later steps count more in the average, by this power."""
    weight_lr_power: NonNegativeFloat | None = None
    """Of schedule-free ones: power of the learning rate by which a step counts in the average."""
    d0: PositiveFloat | None = None
    """Of "prodigy": the first step size."""
    d_coef: PositiveFloat | None = None
    """Of "prodigy": its step size is multiplied by this."""
    growth_rate: Annotated[float, Range(ge=1)] | None = None
    """Of "prodigy": the step size grows by this factor a step at most."""
    use_bias_correction: bool | None = None
    """Of "prodigy": correct the moments for their start at zero, as Adam does."""
    safeguard_warmup: bool | None = None
    """Of "prodigy": leave the warm-up out of the step size's estimate."""
    slice_p: Annotated[int, Range(ge=1, le=1_000_000)] | None = None
    """Of "prodigy": estimate from every n-th weight, which saves state."""
    precondition_frequency: Annotated[int, Range(ge=1, le=1_000_000)] | None = None
    """Of "soap": steps between two new bases."""
    max_precondition_dim: Annotated[int, Range(ge=1, le=1_000_000)] | None = None
    """Of "soap": edges longer than this keep their basis."""


@frozen(kw_only=True)
class ScheduleRecipe:
    """The learning rate over the run."""

    name: Literal["constant", "linear", "cosine", "cosine-with-restarts", "polynomial"] = "constant"
    """What it does after the warm-up, up to the last step."""
    warmup: Share = field(factory=lambda: Share.parse("0 steps"))
    """Linear rise from 0: "200 steps" or "10%" of the run."""
    end: Probability = 0.0
    """The last learning rate, as a share of `lr`."""
    power: PositiveFloat = 1.0
    """Of "polynomial"."""
    cycles: Annotated[int, Range(ge=1, le=100_000)] = 1
    """Of "cosine-with-restarts": how often it falls."""


@frozen(kw_only=True)
class TimestepsRecipe:
    """At which noise levels the model is trained."""

    sampling: Literal["auto", "uniform", "logit-normal", "mode", "cosmap", "beta"] = "auto"
    """Density of u in [0, 1) before the shift; u near 0 is pure noise."""
    shift: Shift | Literal["auto", "resolution"] = "auto"
    """sigma = shift s / (1 + (shift - 1) s) with s = 1 - u. "auto": as the base's scheduler.
    "resolution": from the number of a picture's tokens, by the family's own rule."""
    mean: Mean = 0.0
    """Of "logit-normal": positive means less noise."""
    std: PositiveFloat = 1.0
    """Of "logit-normal"."""
    mode_scale: Annotated[float, Range(gt=0, le=1.75)] = 1.29
    """Of "mode"."""
    alpha: Annotated[float, Range(ge=0.05, le=1000)] = 2.0
    """Of "beta", whose density is u^(alpha - 1) (1 - u)^(beta - 1): more means less noise."""
    beta: Annotated[float, Range(ge=0.05, le=1000)] = 2.0
    """Of "beta": more means more noise."""
    min: Probability = 0.0
    """Least noise that is trained, as sigma after the shift; of a model with a table of T noise
    levels, timestep t is (t + 1) / T. Inside `min` and `max` the density keeps its shape."""
    max: Probability | Auto = "auto"
    """Most noise that is trained, as sigma after the shift. "auto": 1, pure noise; for an expert
    for little noise (SDXL's refiner) what it was made for."""
    stratified: bool = False
    """Share the density out among the samples of a step: each draws from a part of its own, in
    random order. Steps then differ less in how noisy their samples are."""


@frozen(kw_only=True)
class LossRecipe:
    """The loss."""

    kind: Literal["mse", "huber", "smooth-l1"] = "mse"
    """Of each error e: "mse" e^2, "huber" 2 delta (sqrt(e^2 + delta^2) - delta), "smooth-l1" the
    same divided by delta. The latter two grow like |e| beyond delta, so outliers count less."""
    delta: PositiveFloat = 0.1
    """Of "huber" and "smooth-l1": where the square ends."""
    schedule: Literal["constant", "snr", "exponential"] = "constant"
    """How delta follows the noise level, from 1 without noise to `delta` in pure noise: "snr" is
    delta + (1 - delta) (1 - sigma)^2, "exponential" is delta^sigma."""
    weighting: Literal[
        "none", "diffusers-compat", "sigma-sqrt", "cosmap", "min-snr", "soft-min-snr"
    ] = "none"
    """Weight by noise level. In flow matching: "diffusers-compat" is sigma^2, what the SD3 example
    scripts do; "sigma-sqrt" is sigma^-2, "cosmap" 2 / (pi (1 - 2 sigma + 2 sigma^2)). For models
    that predict the noise or v: "min-snr" (arXiv 2303.09556) weighs the error of the picture by
    min(SNR, gamma), "soft-min-snr" by SNR gamma / (SNR + gamma)."""
    gamma: PositiveFloat = 5.0
    """Of "min-snr" and "soft-min-snr"."""


@frozen(kw_only=True)
class NoiseRecipe:
    """The noise itself, for models that predict the noise or v."""

    offset: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Adds so much normal noise that is the same in all places of a channel: the model learns to
    make very dark and very bright pictures."""
    zero_terminal_snr: bool | Auto = "auto"
    """Rescale the noise levels so that the last one is pure noise (arXiv 2305.08891). "auto": as
    the base's scheduler. For models that predict v."""


@frozen(kw_only=True)
class EmaRecipe:
    """Exponential moving average of the trained weights."""

    decay: Annotated[float, Range(gt=0, lt=1)] = 0.999
    """Share kept at each update."""
    device: Literal["cpu", "same"] = "cpu"
    """Where the average lives."""
    every: Interval = field(factory=lambda: Interval.parse("1 steps"))
    """How often it is updated."""
    warmup: bool = False
    """Begin with less: at its k-th update the decay is min((1 + k) / (10 + k), decay), so that the
    weights of the start do not stay in it for long."""
    save: Literal["average", "both"] = "average"
    """What the result holds. "both": the trained weights, and the average beside them, in a folder
    of the same name with `_ema` (`lora_ema`, or `transformer_ema` in the pipeline)."""


@frozen(kw_only=True)
class GuardRecipe:
    """What to do when a loss or a gradient is not finite. Such a step never changes a weight."""

    skip: Annotated[int, Range(ge=0, le=1_000_000)] = 0
    """Pass over so many of these steps in the whole run; the next one ends it."""


@frozen(kw_only=True)
class TextEncodersRecipe:
    """Train the family's CLIP text encoders with the model: by adapters of their own with
    `[adapter]`, else all of their weights. An empty table trains all of them."""

    which: Annotated[tuple[str, ...], Length(ge=1)] | Literal["all"] = "all"
    """Names of those that are trained, such as ["text_encoder_2"]."""
    lr: PositiveFloat | Auto = "auto"
    """Their learning rate, on the same schedule. "auto": as `[train.optimizer]`. A tenth to a half
    of that is usual: they learn faster than the model, and forget."""
    until: Share = field(factory=lambda: Share.parse("100%"))
    """After so much of the run they stay as they are."""
    rank: Annotated[int, Range(ge=1, le=16_384)] | Auto = "auto"
    """Of their adapters. "auto": as `[adapter]`; the scale is that in each case."""
    targets: Literal["attention", "all-linear"] = "attention"
    """Of their adapters: the layers of the attention, or those between too."""


@frozen(kw_only=True)
class TrainRecipe:
    """The training run. Give exactly one of `epochs` and `steps`."""

    optimizer: OptimizerRecipe
    """The optimizer and its learning rate."""
    epochs: Annotated[int, Range(ge=1, le=1_000_000)] | None = None
    """Passes over the data."""
    steps: Annotated[int, Range(ge=1, le=100_000_000)] | None = None
    """Optimizer updates."""
    batch_size: BatchSize | dict[Annotated[int, Range(ge=1, le=8192)], BatchSize] = 1
    """Samples in one forward pass of one device. Or a table by the resolution of the sources in
    pixels: `{ 512 = 4, 1024 = 1 }`."""
    accumulate: Annotated[int, Range(ge=1, le=65_536)] = 1
    """Batches in one optimizer update."""
    schedule: ScheduleRecipe = field(factory=ScheduleRecipe)
    """The learning rate over the run."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip gradients to this global L2 norm; 0 does not clip."""
    timesteps: TimestepsRecipe = field(factory=TimestepsRecipe)
    """At which noise levels the model is trained."""
    loss: LossRecipe = field(factory=LossRecipe)
    """The loss."""
    noise: NoiseRecipe = field(factory=NoiseRecipe)
    """The noise."""
    guidance: NonNegativeFloat | Auto = "auto"
    """The guidance scale that a model which was distilled from guidance (Flux dev) is told while it
    is trained. "auto": 1."""
    text_encoders: TextEncodersRecipe | None = None
    """Train text encoders too; absent: they stay as they are, and embeddings are cached."""
    ema: EmaRecipe | None = None
    """Keep an exponential moving average."""
    guard: GuardRecipe = field(factory=GuardRecipe)
    """What to do when a loss or a gradient is not finite."""


@frozen(kw_only=True)
class SprintRecipe:
    """Distil the base into a model of one to four steps (SANA-Sprint, arXiv 2503.09641). A student
    learns from the base, its teacher; a discriminator judges what it draws."""

    guidance: Annotated[tuple[PositiveFloat, ...], Length(ge=1)] = (4.0, 4.5, 5.0)
    """Scales of the teacher's guidance; each sample draws one, which the student is told."""
    guidance_embeds_scale: PositiveFloat = 0.1
    """What the scale is multiplied by for the network."""
    sigma_data: PositiveFloat = 0.5
    """Deviation of the latents as the student is given them."""
    mean: Mean = 0.2
    """Of log(sigma_data tan t), normal: the student's angles t. More is more noise."""
    std: PositiveFloat = 1.6
    """Its deviation."""
    discriminator_mean: Mean = -0.6
    """The same of the noise under which the discriminator judges."""
    discriminator_std: PositiveFloat = 1.0
    """Its deviation."""
    tangent_warmup: Annotated[int, Range(ge=0, le=100_000_000)] = 4000
    """Steps over which the part of the loss that rests on the forward derivative grows in."""
    consistency_weight: NonNegativeFloat = 1.0
    """Of the consistency loss."""
    adversarial_weight: NonNegativeFloat = 0.5
    """Of the discriminator's judgement in the student's loss. 0: no discriminator, and every step
    is the student's; else its steps and the discriminator's take turns."""
    heads: Annotated[tuple[Annotated[int, Range(ge=0)], ...], Length(ge=1)] | Auto = "auto"
    """Blocks of the teacher whose output a head of the discriminator judges, counted from 0."""
    train_largest_timestep: bool = False
    """Let the discriminator judge pictures that start from pure noise, as one step does."""
    largest_timestep: Annotated[float, Range(gt=0, le=1.5708)] = 1.5708
    """The angle of pure noise."""
    largest_timestep_prob: Probability = 0.5
    """Share of the pictures judged that start there."""
    misaligned_pairs: bool = False
    """Real pictures beside the prompt of another one of the batch are fakes too."""
    discriminator_lr: PositiveFloat | Auto = "auto"
    """Its learning rate, which no schedule changes. "auto": the student's."""
