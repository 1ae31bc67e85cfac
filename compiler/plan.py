"""The plan: what a run will do, resolved to the last value.

A plan holds no "auto", no default that is still open and no relative path. It is immutable, it is
written into the run folder as `plan.lock.toml`, and its digest names it. The runtime executes a
plan and decides nothing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from attrs import asdict, field, frozen

from compiler.adapters import AdapterKind

PLAN_FORMAT = 1

Device = Literal["cpu", "cuda", "mps", "xpu"]
Dtype = Literal["float32", "bfloat16", "float16"]
Judged = Literal["average", "trained"]
Quantisation = Literal["none", "int8", "int4", "nf4", "fp8"]
AttentionKernel = Literal[
    "native",
    "native-flash",
    "native-efficient",
    "native-cudnn",
    "native-math",
    "flash",
    "flash-3",
    "xformers",
    "sage",
]


@frozen(kw_only=True)
class Component:
    """One part of the base model, named as Diffusers names it (`transformer`, `vae`, ...)."""

    name: str
    class_name: str
    parameters: int  # 0 for tokenizers and schedulers
    dtype: Dtype  # what it is loaded as
    trained: bool
    quantize: Quantisation = "none"  # how its frozen weights are kept
    quantize_on: Literal["cpu", "device"] = "device"  # where they are quantised while loading
    tiling: bool = False  # of the vae: pictures are encoded and decoded in tiles
    file: str | None = None  # absolute path of its weights; None: they are the base's


@frozen(kw_only=True)
class Model:
    """The base model. `configs` holds each component's configuration as JSON text, as Diffusers
    stores it (text, because TOML has no null)."""

    family: str
    base: str  # hub id or absolute folder
    local: bool  # base is a folder on this machine
    revision: str  # "" for a local folder
    init: Literal["pretrained", "random"]  # of the trained component
    trained_component: str  # "transformer" or "unet"
    components: tuple[Component, ...]
    configs: dict[str, str]

    @property
    def origin(self) -> str:
        """What it starts from, in words: the base, or the file of what is trained and the base."""
        return self._started_from(self.base)

    @property
    def called(self) -> str:
        """The base's id, or its folder's name: where that lies is nobody else's business."""
        return Path(self.base).name if self.local else self.base

    @property
    def shared_origin(self) -> str:
        """The same as `origin`, for files that others read."""
        return self._started_from(self.called)

    def _started_from(self, base: str) -> str:
        trained = next((c for c in self.components if c.name == self.trained_component), None)
        own = trained.file if trained and self.init == "pretrained" else None
        return f"{Path(own).name}, with the rest of {base}" if own else base


@frozen(kw_only=True)
class Ranked:
    """The rank of the modules that `pattern` matches in full."""

    pattern: str
    rank: int


@frozen(kw_only=True)
class Scaled:
    """The alpha of the modules that `pattern` matches in full."""

    pattern: str
    alpha: float


@frozen(kw_only=True)
class Adapter:
    """An adapter; a plan without one is a full fine-tune. What a kind can be told stands in
    `compiler.adapters`; the rest keeps its default."""

    kind: AdapterKind
    rank: int  # 0: of a kind without
    alpha: float
    dropout: float
    init: str  # a name of `compiler.adapters.Init`; "": the only one of its kind
    targets: tuple[str, ...]  # module name patterns (regular expressions, full match)
    exclude: tuple[str, ...] = ()  # such patterns: what they match is not adapted
    min_rank: int = 0  # of LoRA: what is left of the rank where all is noise; 0: all of it
    ranks: tuple[Ranked, ...] = ()  # the first that matches a module counts
    alphas: tuple[Scaled, ...] = ()
    scaling: Literal["rank", "sqrt-rank"] = "rank"
    rank_dropout: float = 0.0  # chance of a row of the update
    module_dropout: float = 0.0  # chance of a whole module's update
    factor: int = 0  # of LoKr: size to be near to; 0: the root of each edge
    decompose_both: bool = False
    full_matrix: bool = False  # of LoKr: neither factor is decomposed, whatever the rank
    tucker: bool = False  # of LoKr and LoHa: kernels of several pixels apart (Tucker's)
    weight_decompose: bool = False  # of LoKr and LoHa: lengths of rows apart
    train_norm: bool = False  # norms beside the targets; of kinds in LyCORIS' files
    block_size: int = 0  # of OFT and BOFT: inputs; of DyLoRA: ranks that a step trains
    block_share: bool = False
    butterfly_factors: int = 0  # of BOFT
    start: str = ""  # file of an adapter to start from
    start_digest: str = ""  # SHA-256 of that file


@frozen(kw_only=True)
class TextTraining:
    """Text encoders that are trained beside the model. Their part of a prompt's embedding is made
    anew in each step; that of the others is cached."""

    encoders: tuple[str, ...]  # component names
    lr: float  # on the run's schedule
    until: int  # steps, after which they stay as they are
    adapter: Adapter | None = None  # on each of them; None: all of their weights are trained


@frozen(kw_only=True)
class NewToken:
    """A word that the text encoders learn: so many vectors, each a token of its own."""

    token: str
    vectors: int
    initial: str = ""  # a text whose tokens' vectors it starts from; "": random ones
    start: str = ""  # file of its vectors to start from
    start_digest: str = ""  # SHA-256 of that file's header


@frozen(kw_only=True)
class Embeddings:
    """New tokens (textual inversion, arXiv 2208.01618). Only their vectors are trained; all others
    of the encoders' tables stay as they are."""

    encoders: tuple[str, ...]  # each has vectors of its own
    tokens: tuple[NewToken, ...]
    lr: float  # on the run's schedule
    until: int  # steps, after which they stay as they are


@frozen(kw_only=True)
class Precision:
    """Number formats: of the forward pass, the frozen base, and what is trained."""

    compute: Dtype
    weights: Dtype  # frozen parts
    trained: Dtype  # adapter or trained weights (masters)
    cache: Dtype  # cached latents and embeddings


@frozen(kw_only=True)
class Speed:
    """How the same formulas are computed. Last bits of the result depend on each entry."""

    compile: Literal["off", "regional"] = "off"  # "regional": each block of the trained component
    attention: AttentionKernel = "native"  # of the trained component; "native": PyTorch's choice
    channels_last: bool = False  # memory format of a UNet
    fused_projections: bool = False  # queries, keys and values by one product
    tf32: bool = False  # factors of float32 products are rounded to 10 bits, on CUDA
    tokens: int = 0
    """Prompts are padded to so many tokens, masked, so that compiled blocks see few shapes; 0: a
    batch is as long as its longest prompt."""


@frozen(kw_only=True)
class Text:
    """How prompts become embeddings; the same in training, caching, validation and inference."""

    max_length: int  # tokens, of the longest encoder
    instruction: tuple[str, ...]  # lines put before each prompt; empty for none
    zeros_for_empty: bool | None = None  # of the negative prompt; None: the pipeline knows no such


@frozen(kw_only=True)
class Geometry:
    """How one source's pictures become training samples."""

    resolution: float  # pixels (an edge, or the root of the area), or megapixels for "area"
    resolution_type: Literal["pixel", "area", "pixel_area"]
    aspect: Literal["square", "preserve", "closest", "random"]
    crop: Literal["center", "corner", "random", "face", "saliency"]
    multiple: int  # bucket edges are multiples of this many pixels
    buckets: tuple[str, ...] = ()  # ratios ("3:2") of aspect "closest" and "random"
    resize: Literal["cover", "none"] = "cover"  # before the cut
    max_size: int = 0  # pixels; of resize "none": shorter edge of what is cut from; 0: any
    upscale: bool = True  # enlarge what is smaller than its bucket
    flip: bool = False  # each image is a second sample, mirrored


@frozen(kw_only=True)
class Captions:
    """Where one source's captions come from."""

    kind: Literal["textfile", "filename", "instance", "json", "column"]
    prompt: str  # of kind or missing "instance"
    missing: Literal["error", "skip", "empty", "filename", "instance"]
    multiline: Literal["join", "first", "alternatives"]
    dropout: float  # share of samples trained with the empty prompt
    key: str = ""  # of kind "json"
    column: str = ""  # of kind "column"
    fallback: tuple[str, ...] = ()  # columns that count where that one says nothing
    prefix: str = ""
    suffix: str = ""
    trigger: str = ""  # the word that stands for what is learned
    shuffle: bool = False  # of the tags behind the first `keep_tokens`
    keep_tokens: int = 0
    separator: str = ","  # of tags
    tag_dropout: float = 0.0  # share of those tags that are left out
    variants: int = 1  # cached forms of each caption, where shuffling or dropout makes them differ


@frozen(kw_only=True)
class Mask:
    """Which part of each picture is learned, and what the rest counts."""

    kind: Literal["alpha", "file"]
    floor: float  # weight of what the mask leaves out, 0 to below 1
    folder: str = ""  # of kind "file": the absolute folder that the masks' keys are below
    suffix: str = ""  # of kind "file": between the picture's name and the mask's ending
    missing: Literal["error", "whole"] = "error"  # of kind "file"


@frozen(kw_only=True)
class DataSource:
    """One source of images, as the plan found it."""

    id: str
    path: str  # absolute: a folder, or what holds the files that it is made of
    kind: Literal["folder", "webdataset", "parquet", "arrow", "table"] = "folder"
    files: int = 0  # tars, shards or tables
    column: str = ""  # of a shard or table: the images'
    repeats: str  # passes per epoch, an exact decimal or fraction ("5", "0.25", "7/3")
    geometry: Geometry
    captions: Captions
    broken: Literal["error", "skip"]
    images: int  # usable; a mirrored one counts as another
    skipped: int
    texts: int = 0  # distinct captions to encode
    fallbacks: int = 0  # images without a caption of their own that `missing` gave another
    held_out: int = 0  # images that are not trained on
    regularisation: bool = False  # class images, for prior preservation
    loss_weight: float = 1.0  # the loss of each sample is multiplied by it
    target: Literal["image", "base"] = "image"  # "base": what the base predicts without adapter
    mask: Mask | None = None  # None: all of each picture counts alike
    first: str = ""  # steps or epochs after which it joins ("2 epochs"); "": from the start
    until: str = ""  # steps or epochs after which it leaves; "": never


@frozen(kw_only=True)
class Bucket:
    """All samples of one source and one size."""

    source: str
    width: int  # pixels
    height: int
    images: int
    samples: int  # per epoch: ceil(images * repeats)
    batch_size: int
    batches: int  # per epoch: ceil(samples / batch_size); the last one may be short


@frozen(kw_only=True)
class Stage:
    """Epochs of a run in which the same sources train, up to the next stage."""

    first_epoch: int  # epochs before it
    first_step: int  # steps before it
    per_epoch: int
    batches_per_epoch: int
    samples_per_epoch: int
    sources: tuple[str, ...]  # ids


@frozen(kw_only=True)
class Steps:
    """The arithmetic of the run; a step is one optimizer update. Where sources come and go, what
    is said of an epoch is said of the first one."""

    total: int
    per_epoch: int  # ceil(batches_per_epoch / (ranks * accumulate))
    epochs: int  # begun
    batches_per_epoch: int  # over all ranks
    samples_per_epoch: int
    accumulate: int
    ranks: int
    micro_batch: int = 0
    """Samples at most in one forward pass: a larger batch is run in parts. 0: whole batches. Sums
    are split by it, so the last bits of the result depend on it."""
    stages: tuple[Stage, ...] = ()  # where sources come and go; else empty


@frozen(kw_only=True)
class Sharing:
    """How several ranks share the work."""

    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """Whether each rank holds the whole model, or a share of every weight. The sums over ranks are
    added up in another order, so the last bits of the result depend on it."""
    reshard: bool = True  # of "fsdp": a block is let go between its forward and its backward pass
    stage: int = 0  # of ZeRO, 1 to 3; 0: not "deepspeed"
    offload_optimizer: bool = False  # of "deepspeed": state and float32 weights wait on the host


@frozen(kw_only=True)
class Optimizer:
    """An optimizer by its name in `compiler.optimizers`, and all of its arguments."""

    name: str
    lr: float
    arguments: dict[str, Any]
    fused: bool


@frozen(kw_only=True)
class Schedule:
    """The learning rate over the run's steps; `warmup` and `length` are steps."""

    name: Literal["constant", "linear", "cosine", "cosine-with-restarts", "polynomial"]
    warmup: int
    length: int
    end: float  # the last learning rate as a share of the first
    power: float
    cycles: int  # falls of "cosine-with-restarts"; others have one


@frozen(kw_only=True)
class FarShift:
    """The line that mu is on where a picture has more than `tokens` tokens."""

    tokens: int
    slope: float
    start: float  # mu at no token


@frozen(kw_only=True)
class ShiftRule:
    """A shift that follows from a picture's tokens, see `compiler.noise`."""

    patch: int  # latents along the edge of a token
    base_tokens: int
    max_tokens: int
    base_shift: float  # mu at `base_tokens`
    max_shift: float  # mu at `max_tokens`
    kind: Literal["exponential", "linear"]
    far: FarShift | None = None


@frozen(kw_only=True)
class NoiseTable:
    """How much of the picture is left at each timestep: abar_t = prod(1 - beta)."""

    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"]  # of the betas
    beta_start: float
    beta_end: float
    zero_terminal_snr: bool = False  # rescaled, so that nothing is left at the last one
    timesteps: int = 1000


@frozen(kw_only=True)
class Objective:
    """What the loss compares, and at which noise levels.

    A level is sigma in (0, 1]. In flow matching it is the share of noise; with a `table` it is the
    place there, (t + 1) / T for timestep t of T.
    """

    prediction: Literal["flow", "epsilon", "v"]
    table: NoiseTable | None = None  # of "epsilon" and "v"
    sampling: Literal["uniform", "logit-normal", "mode", "cosmap", "beta"]
    logit_mean: float
    logit_std: float
    mode_scale: float
    alpha: float = 2.0  # of sampling "beta"
    beta: float = 2.0
    shift: float  # 0: `shift_by_size` says it
    shift_by_size: ShiftRule | None = None
    min_sigma: float = 0.0  # noise levels, after the shift, that are trained
    max_sigma: float = 1.0
    stratified: bool = False  # the samples of one step share the density out among them
    loss: Literal["mse", "huber", "smooth-l1"]
    delta: float = 0.1  # of both others than "mse"
    delta_schedule: Literal["constant", "snr", "exponential"] = "constant"
    weighting: Literal[
        "none", "diffusers-compat", "sigma-sqrt", "cosmap", "min-snr", "soft-min-snr"
    ]
    gamma: float = 5.0  # of both SNR weightings
    offset_noise: float = 0.0
    guidance: float | None = None  # told to a model that was distilled from it; None: nothing is


@frozen(kw_only=True)
class Sprint:
    """Distillation into a model of one to four steps, see `runtime.methods.sprint`. Updates of the
    student and of the discriminator take turns, the student's first."""

    teacher_time: float  # what the base takes for the end of the flow; the student takes 1
    sigma_data: float  # deviation of what the student is given
    guidance: tuple[float, ...]  # scales, one of which is drawn for each sample
    guidance_embeds_scale: float  # what they are multiplied by for the network
    mean: float  # of log(s tan t), the student's angles
    std: float
    discriminator_mean: float  # the same of the discriminator's
    discriminator_std: float
    tangent_warmup: int  # steps
    consistency_weight: float
    adversarial_weight: float  # 0: there is no discriminator, and all updates are the student's
    heads: tuple[int, ...]  # blocks whose output a head judges
    largest_angle: float
    largest_share: float  # of the samples judged that start from `largest_angle`
    misaligned_pairs: bool  # pictures beside another's prompt are fakes too
    discriminator: Optimizer


@frozen(kw_only=True)
class Ema:
    """Exponential moving average of what is trained; absent: none."""

    decay: float
    device: Literal["cpu", "same"]
    every: int  # steps
    warmup: bool = False  # of the decay, see `runtime.ema`
    save: Literal["average", "both"] = "average"  # what the result holds


@frozen(kw_only=True)
class Guard:
    """What happens when a loss or a gradient is not finite. Such a step changes no weight."""

    skip: int = 0  # so many of them are passed over; the next one ends the run


@frozen(kw_only=True)
class Checkpoints:
    """`every` is steps (0: only at the end and when stopped); `keep` 0 keeps all."""

    every: int
    keep: int
    keep_every: int = 0  # steps; multiples of it are kept besides; 0: none
    best: str = ""  # a metric; the best checkpoint by it is kept besides
    result: Literal["last", "best"] = "last"  # the result's weights


@frozen(kw_only=True)
class Publish:
    """Who is told of a run's end, and what they get; "": nobody."""

    hub: str  # a repository, "owner/name"
    private: bool  # if it is made for this
    checkpoints: bool  # they are uploaded too
    webhook: str  # an address


@frozen(kw_only=True)
class Prompt:
    """One validation picture is drawn per prompt, size and seed; scores are told per `group`."""

    name: str
    text: str
    group: str = ""


@frozen(kw_only=True)
class Validation:
    """Pictures drawn while training. No prompts: no validation."""

    every: int  # steps; 0: only at the end
    at_start: bool  # the untrained model's pictures, to set beside
    prompts: tuple[Prompt, ...]
    negative: str
    sizes: tuple[tuple[int, int], ...]  # (width, height)
    guidance: float
    steps: int
    seeds: tuple[int, ...]
    score: str  # "" or a name in `runtime.scores`
    scheduler: str = ""  # "" for the base's own, or a name in `compiler.samplers`
    clip_model: str = ""  # absolute folder or hub id of what gives the CLIP score; "": none
    picture: str | None = None  # absolute path of what is refined; None: drawn from noise
    weights: Judged | None = None  # which draw; None: the average if one is kept


EVALUATION = "evaluation/"
"""Begins the names of the metrics that judge: of held-out images, and of pictures drawn."""


@frozen(kw_only=True)
class HeldOut:
    """Held-out images of one source and one size."""

    source: str
    width: int  # pixels
    height: int
    images: int
    batch_size: int


@frozen(kw_only=True)
class Evaluation:
    """The loss of what is held out, at fixed noise levels with fixed noise."""

    every: int  # steps; besides, at the start and at the end
    timesteps: tuple[float, ...]  # quantiles of the density of noise levels
    weights: Judged
    manifest: str  # digest of the list of held-out images
    groups: tuple[HeldOut, ...]


@frozen(kw_only=True)
class Phase:
    """Peak memory of one phase; `parts` adds up to `device_bytes`."""

    name: str
    device_bytes: int
    host_bytes: int
    parts: dict[str, int]


@frozen(kw_only=True)
class Layout:
    """Where and when the same numbers are computed and kept. Nothing here alters a result."""

    activation_checkpointing: int = 0  # every n-th block is recomputed; 0: off
    fused_backward: bool = False  # each weight is updated as soon as its gradient is complete
    offload_activations: bool = False  # what the backward pass needs waits in host memory
    offload_blocks: int = 0  # of the frozen base: so many blocks wait in host memory


@frozen(kw_only=True)
class Rung:
    """One step of the ladder of settings by which a run is made to fit."""

    settings: dict[str, str]  # key of the recipe -> value, of all that the ladder may choose
    peak_bytes: int
    relative_time: float  # of a step, modelled; 1: the first rung
    alters: bool  # it trains other weights than the first rung
    chosen: bool


@frozen(kw_only=True)
class Memory:
    """`budget_bytes` 0: no budget was given."""

    budget_bytes: int
    layout: Layout = field(factory=Layout)
    on_oom: Literal["stop", "next-rung"] = "stop"
    phases: tuple[Phase, ...]
    ladder: tuple[Rung, ...] = ()  # from the top down, as far as it was looked at
    counts: dict[str, int] = field(factory=dict)
    """Of the simulated step: "parameters", "trainable", "adapted" (modules), "flops"; empty where
    nothing was simulated."""
    overhead: float = 1.0
    """Modelled time of a step over that of its operations alone: weights that are read, kernels
    that are sent off, what crosses to the host and back. 1 where the device is not known."""


@frozen(kw_only=True)
class Decision:
    """One resolved value: who gave it (a line, a preset, a family, a pass) and why."""

    key: str
    value: str
    source: str
    why: str


@frozen(kw_only=True)
class Plan:
    """Everything that a run does; see the classes above for units."""

    format: int
    name: str
    seed: int
    run_folder: str
    cache_folder: str
    device: Device
    model: Model
    adapter: Adapter | None = None
    text_training: TextTraining | None = None
    embeddings: Embeddings | None = None
    precision: Precision
    speed: Speed = field(factory=Speed)
    text: Text
    sources: tuple[DataSource, ...]
    buckets: tuple[Bucket, ...]
    manifest: str  # digest of the list of samples
    steps: Steps
    sharing: Sharing = field(factory=Sharing)
    optimizer: Optimizer
    schedule: Schedule
    objective: Objective
    sprint: Sprint | None = None
    max_grad_norm: float  # 0: no clipping
    ema: Ema | None = None
    guard: Guard = field(factory=Guard)
    checkpoints: Checkpoints
    validation: Validation
    evaluation: Evaluation | None = None
    memory: Memory
    track: tuple[str, ...]
    track_project: str = ""  # what services group runs by
    publish: Publish | None = None
    workers: int  # threads that decode and resize
    vae_batch: int = 1  # pictures of one bucket that are encoded together; latents depend on it
    threads: int  # of one operation on the CPU; sums are split by it, so results depend on it
    decisions: tuple[Decision, ...]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over everything but the decisions' wording and the memory estimate."""
        return digest_of({k: v for k, v in plain(self).items() if k not in NOT_IN_DIGEST})


NOT_IN_DIGEST = frozenset({"decisions", "memory"})

NOT_TRAJECTORY = {
    "name": "a run is called by it",
    "run_folder": "where results are written",
    "cache_folder": "where latents and embeddings are kept; they are found by content",
    "checkpoints": "when the state is written, and how much of it is kept",
    "validation": "pictures are drawn from random numbers of their own",
    "evaluation": "losses are measured with random numbers of their own",
    "guard": "a run that met more bad steps than it allows has ended",
    "track": "who else is told of the metrics",
    "track_project": "what they group runs by",
    "publish": "where results are sent",
    "workers": "threads that decode; the order of samples does not depend on them",
}
"""Entries of a plan that alter no trained weight, and why not. All others do: a run can't go on
under another value of them as if nothing had changed."""


def alters_trajectory(key: str) -> bool:
    """Whether a plan that differs at the dotted `key` trains other weights."""
    return key.split(".")[0].split("[")[0] not in NOT_IN_DIGEST | NOT_TRAJECTORY.keys()


def plain(value: Any) -> dict[str, Any]:
    """`value`, an attrs instance, as dicts and lists without absent entries (TOML has no null)."""
    tree = asdict(value, recurse=True)
    cleaned = _without_none(tree)
    assert isinstance(cleaned, dict)
    return cleaned


def digest_of(tree: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `tree`."""
    return hashlib.sha256(canonical(tree).encode()).hexdigest()


def canonical(tree: Any) -> str:
    """JSON in ASCII, without spaces, keys sorted."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _without_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _without_none(v) for k, v in tree.items() if v is not None}
    if isinstance(tree, list | tuple):
        return [_without_none(v) for v in tree]
    return tree


def lock_path(run_folder: Path) -> Path:
    """Where a run folder keeps its plan."""
    return run_folder / "plan.lock.toml"
