"""What comes of it and where: checkpoints, validation, trackers, uploads, caches, devices."""

from __future__ import annotations

from typing import Annotated, Literal

from attrs import field, frozen

from compiler.schema.ranges import (
    Auto,
    Count,
    Format,
    NonNegativeFloat,
    Seed,
)
from compiler.structure import Length, Range
from compiler.units import Interval


@frozen(kw_only=True)
class CheckpointsRecipe:
    """What is kept to go on from."""

    every: Interval = field(factory=lambda: Interval.parse("1 epoch"))
    """How often a checkpoint is written; "off": only at the end."""
    keep: Count = 3
    """How many of the newest are kept; 0 keeps all."""
    keep_every: Interval = field(factory=lambda: Interval.parse("off"))
    """Besides, keep those whose step is a multiple of this."""
    best: str = ""
    """Besides, keep the best by a metric: "evaluation/loss", that of one source
    ("evaluation/loss/ID"), or "evaluation/clip_score". "": none."""
    result: Literal["last", "best"] = "last"
    """Which weights the result holds: those of the last step, or of the `best` checkpoint."""


@frozen(kw_only=True)
class ValidationRecipe:
    """Pictures drawn while training."""

    prompts: dict[str, str | dict[str, str]] | str = field(factory=dict)
    """Name -> prompt, or group -> its prompts, or a .toml or .json file of them."""
    every: Interval = field(factory=lambda: Interval.parse("1 epoch"))
    """How often; "off": only at the end."""
    at_start: bool = True
    """Draw the untrained model's pictures first; the report and trackers show them left of later
    ones."""
    negative: str = ""
    """The negative prompt."""
    sizes: Annotated[tuple[str, ...], Length(ge=1)] | Auto = "auto"
    """"WIDTHxHEIGHT" each. "auto": the training resolution, square."""
    guidance: NonNegativeFloat | Auto = "auto"
    """Classifier-free guidance scale."""
    steps: Annotated[int, Range(ge=1, le=1000)] | Auto = "auto"
    """Sampling steps."""
    scheduler: Literal["auto", "euler", "euler-ancestral", "heun", "ddim", "dpm++", "unipc"] = (
        "auto"
    )
    """What samples. "auto": the base's own scheduler, as at inference."""
    weights: Literal["auto", "average", "trained"] = "auto"
    """Which weights draw. "auto": the average ([train.ema]) if there is one."""
    picture: str = ""
    """The picture that is refined with each prompt, scaled and cut to the size: for models that
    refine instead of drawing from noise (SDXL's refiner)."""
    seed: Seed = 42
    """Of the first picture of each prompt."""
    count: Annotated[int, Range(ge=1, le=64)] = 1
    """Pictures of each prompt and size; the seeds are consecutive."""
    score: str = ""
    """A measure of prompt following: "shapes" for the quickstart's drawings."""
    clip_score: bool = False
    """Log how well the pictures fit their prompts as `evaluation/clip_score`: 100 times the cosine
    of CLIP's embeddings of picture and prompt, 0 where that is negative. On the processor."""
    clip_model: Annotated[str, Length(ge=1)] = "openai/clip-vit-base-patch16"
    """Of `clip_score`: hub id or folder of the CLIP model. Scores by different models can't be
    compared."""


@frozen(kw_only=True)
class EvaluationRecipe:
    """The loss of held-out images (`holdout` of a source), at fixed noise levels with fixed noise,
    so that it can be compared from step to step."""

    every: Interval = field(factory=lambda: Interval.parse("1 epoch"))
    """How often, besides at the start and at the end; "off": never."""
    timesteps: Annotated[tuple[Annotated[float, Range(gt=0, lt=1)], ...], Length(ge=1)] = (
        0.1,
        0.3,
        0.5,
        0.7,
        0.9,
    )
    """Quantiles of the noise levels that are trained: 0.5 is their median, 0.9 is noisier."""
    weights: Literal["auto", "average", "trained"] = "auto"
    """Which weights are judged. "auto": the average ([train.ema]) if there is one."""


@frozen(kw_only=True)
class TrackRecipe:
    """Where metrics go besides `metrics.jsonl` and the report."""

    to: tuple[Literal["tensorboard", "wandb", "comet", "mlflow", "swanlab"], ...] = ()
    """Trackers. Keys and addresses of services are taken from their own environment variables, such
    as `WANDB_API_KEY`, never from a recipe. Each is an extra: `pip install tuner[wandb]`."""
    project: Annotated[str, Length(ge=1)] = "tuner"
    """What services group runs by."""


@frozen(kw_only=True)
class PublishRecipe:
    """Where the result goes besides the run folder. Whatever fails here never ends a run."""

    hub: str = ""
    """A repository of the hub, "me/my-model". Gets the result with a model card that carries the
    recipe, the pictures and the base's licence. Needs a token: `hf auth login`, or `HF_TOKEN`."""
    private: bool = True
    """Of a repository that is made: only its owner sees it."""
    checkpoints: bool = False
    """Upload each checkpoint too, so that the run can be gone on with elsewhere."""
    webhook: str = ""
    """An address (https) that is told as JSON when the run begins, ends or fails. Who knows it can
    write to it, so reports, comparisons and model cards show its host alone."""


@frozen(kw_only=True)
class CacheRecipe:
    """Cached latents and text embeddings."""

    path: str = ""
    """Folder (relative to the recipe); by default the user's cache folder. Shared by all runs."""
    precision: Format | Auto = "auto"
    """Number format of what is cached."""
    batch: Annotated[int, Range(ge=1, le=64)] = 1
    """Pictures of one bucket that the VAE encodes together. More need more memory, and may be
    quicker on a GPU. Above 1 the last bits of a latent may depend on what else is in its batch, so
    each `batch` has latents of its own in the cache."""


@frozen(kw_only=True)
class DeepSpeedRecipe:
    """What strategy "deepspeed" (ZeRO) shares out among the devices."""

    stage: Annotated[int, Range(ge=1, le=3)] | Auto = "auto"
    """Each device holds its share of 1: the optimizer's state and the float32 weights; 2: the
    gradients too; 3: the weights that compute too, which are gathered as they are needed. "auto":
    2."""
    offload_optimizer: bool | Auto = "auto"
    """The optimizer's state and the float32 weights wait in host memory, where the processor
    updates them. "auto": false."""


@frozen(kw_only=True)
class LaunchRecipe:
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """"auto": the first accelerator, else the processor."""
    devices: Annotated[int, Range(ge=1, le=4096)] | Auto = "auto"
    """How many of them train together, one process (rank) each. "auto": one."""
    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    """How several devices share the work. "ddp": each holds the whole model, and gradients are
    averaged over all samples of the step. "fsdp": each holds a share of every weight, and a block
    is gathered while it computes. "deepspeed": DeepSpeed's ZeRO, as `deepspeed` says
    (`pip install tuner[deepspeed]`). "auto": "ddp", unless only "fsdp" fits the budget."""
    reshard_after_forward: bool | Auto = "auto"
    """Of "fsdp": let a block's weights go after its forward pass and gather them again for its
    backward pass. "auto": true; false takes the memory of the whole model to save a gathering."""
    deepspeed: DeepSpeedRecipe = field(factory=DeepSpeedRecipe)
    """Of "deepspeed"."""
    threads: Annotated[int, Range(ge=1, le=1024)] | Auto = "auto"
    """Threads of one operation on the processor."""
