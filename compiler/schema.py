"""The recipe as classes: every key, its type, range, default and one line of documentation.

The same classes structure the file, feed the error messages, the editor schema and the reference
page. A field without a default must be given; `"auto"` means that a pass decides and the plan says
what and why. The docstring under a field is its documentation.
"""

from __future__ import annotations

from typing import Annotated, Literal

from attrs import field, frozen

from compiler.plan import AttentionKernel
from compiler.structure import Length, Range
from compiler.units import ByteSize, Interval, Share

Auto = Literal["auto"]

Count = Annotated[int, Range(ge=0, le=1_000_000)]
Seed = Annotated[int, Range(ge=0, le=2**62)]
PositiveFloat = Annotated[float, Range(gt=0)]
Beta = Annotated[float, Range(ge=0, lt=1)]
Probability = Annotated[float, Range(ge=0, le=1)]
BatchSize = Annotated[int, Range(ge=1, le=65_536)]
Format = Literal["bf16", "fp16", "fp32"]


@frozen(kw_only=True)
class ComponentRecipe:
    """One component of the base model, such as `[model.transformer]`."""

    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the base's weights, or from fresh ones (of what is trained, without adapter)."""
    file: str = ""
    """Of what is trained: its weights come from this safetensors file (relative to the recipe), in
    Diffusers' names or its publisher's, and all else from the base."""
    weights: Format | Auto = "auto"
    """Number format it is loaded in. "auto": `[precision] weights` (fp32 for the vae)."""
    quantize: Literal["none", "int8", "int4", "nf4", "fp8", "auto"] = "none"
    """Keep its frozen weights in fewer bits. "auto": only if the memory budget needs it."""
    where: Literal["cpu", "device"] = "device"
    """Where its weights are quantised while they are loaded, one at a time."""
    tiling: bool = False
    """Of the vae: encode and decode large pictures in tiles of 512 pixels, blended at their edges.
    Needs less memory; latents differ a little."""


@frozen(kw_only=True)
class ModelRecipe:
    """The base model."""

    family: str
    """The model family; `tuner doctor` lists them."""
    base: str
    """A hub id, or a folder in the Diffusers layout (relative to the recipe)."""
    revision: str = ""
    """Branch, tag or commit of a hub id."""
    transformer: ComponentRecipe = field(factory=ComponentRecipe)
    """The diffusion transformer, where the family has one."""
    unet: ComponentRecipe = field(factory=ComponentRecipe)
    """The UNet, where the family has one instead."""
    text_encoder: ComponentRecipe = field(factory=ComponentRecipe)
    """The first text encoder."""
    text_encoder_2: ComponentRecipe = field(factory=ComponentRecipe)
    """The second text encoder, where the family has one."""
    text_encoder_3: ComponentRecipe = field(factory=ComponentRecipe)
    """The third text encoder, where the family has one."""
    vae: ComponentRecipe = field(factory=ComponentRecipe)
    """The autoencoder between pixels and latents."""


@frozen(kw_only=True)
class AdapterRecipe:
    """An adapter on the frozen base. Leave the table out for a full fine-tune."""

    kind: Literal["lora", "dora", "lokr", "loha", "oft", "boft"]
    """Low-rank adaptation (arXiv 2106.09685), the same with the lengths of rows apart ("dora",
    2402.09353), Kronecker's ("lokr", 2309.14859) and Hadamard's product ("loha", 2108.06098), or
    rotations of blocks ("oft", 2306.07280) and products of such ("boft", 2311.06243)."""
    rank: Annotated[int, Range(ge=1, le=16_384)] = 16
    """Rank of the update."""
    alpha: PositiveFloat | Auto = "auto"
    """The update is scaled by alpha / rank. "auto": alpha = rank."""
    ranks: dict[str, Annotated[int, Range(ge=1, le=16_384)]] = field(factory=dict)
    """Module name pattern -> rank, where it is not `rank`. The first that matches counts."""
    alphas: dict[str, PositiveFloat] = field(factory=dict)
    """Module name pattern -> alpha, where it is not `alpha`."""
    scaling: Literal["rank", "sqrt-rank"] = "rank"
    """Of "lora" and "dora": scale by alpha / rank, or by alpha / sqrt(rank), which keeps large
    ranks from learning less (rsLoRA, arXiv 2312.03732)."""
    dropout: Probability = 0.0
    """Dropout on the input of "lora" and "dora"; share of the blocks that "oft" and "boft" leave
    unrotated in a step."""
    rank_dropout: Probability = 0.0
    """Of "lokr" and "loha": chance of each row of the update to be left out in a step."""
    module_dropout: Probability = 0.0
    """Of "lokr" and "loha": chance of a layer to go without its update in a step."""
    init: Literal["gaussian", "kaiming", "orthogonal", "pissa", "olora"] = "gaussian"
    """Of "lora" and "dora": how the first matrix starts (the second one starts at zero). Of "lora":
    "orthogonal" starts both so that their product is zero; "pissa" (arXiv 2404.02948) starts with
    the largest singular values of the base's weights and "olora" (2406.01775) with their QR
    decomposition, both of which the result gives back to the base."""
    factor: Annotated[int, Range(ge=2, le=65_536)] | None = None
    """Of "lokr": edges are split into two numbers, one of which is near to this; by default both
    are near to the root."""
    decompose_both: bool = False
    """Of "lokr": decompose the first matrix too where `rank` is small enough."""
    block_size: Annotated[int, Range(ge=2, le=16_384)] | None = None
    """Of "oft" and "boft", which have no rank: inputs that are rotated together. Must divide their
    number. By default 32 and 8."""
    block_share: bool = False
    """Of "oft": rotate all blocks of a layer alike."""
    butterfly_factors: Annotated[int, Range(ge=1, le=16)] = 1
    """Of "boft": how many rotations follow each other, each on other blocks."""
    targets: str | tuple[str, ...] = "auto"
    """A named set of the family ("attention", "all-linear"), or module name patterns."""
    exclude: tuple[str, ...] = ()
    """Module name patterns: what they match is left as it is."""
    from_: str = field(default="", metadata={"key": "from"})
    """An adapter's file of the same kind and ranks to start from (relative to the recipe), as a
    run's result folder or `tuner export` has it."""


@frozen(kw_only=True)
class OffloadRecipe:
    """What waits in host memory. `offload = "auto"` or `"none"` stands for the whole table."""

    activations: bool | Auto = "auto"
    """What the backward pass needs waits in host memory."""
    blocks: Annotated[int, Range(ge=0, le=1000)] | Auto = "auto"
    """So many blocks of the frozen base wait in host memory until they are needed."""


@frozen(kw_only=True)
class MemoryRecipe:
    """What the run may use."""

    budget: ByteSize | Literal["auto", "none"] = "auto"
    """Device memory. "auto": what the device has free; "none": do not compare."""
    activation_checkpointing: Annotated[int, Range(ge=0, le=1000)] | Literal["off", "auto"] = "auto"
    """Recompute every n-th block in the backward pass. "off" or 0: none; 1: all."""
    fused_backward: bool | Auto = "auto"
    """Update each weight as soon as its gradient is complete, and drop the gradient. Results stay
    the same, bit for bit. Needs `max_grad_norm = 0` and no accumulation."""
    offload: OffloadRecipe | Literal["auto", "none"] = field(factory=OffloadRecipe)
    """What waits in host memory until it is needed. Results stay the same, bit for bit."""
    micro_batch: Annotated[int, Range(ge=1, le=65_536)] | Auto = "auto"
    """Samples at most in one forward pass: a larger batch is run in parts and its gradients are
    added up. Steps stay the same. "auto": whole batches, or what fits."""
    on_oom: Literal["stop", "next-rung"] = "stop"
    """When the device is out of memory all the same: stop, or go on from the last step with the
    next setting that needs less."""


@frozen(kw_only=True)
class PrecisionRecipe:
    """Number formats."""

    compute: Format | Auto = "auto"
    """Of the forward and backward pass."""
    weights: Format | Auto = "auto"
    """Of the frozen base."""
    trained: Format | Auto = "auto"
    """Of the adapter, or of the weights in a full fine-tune."""


@frozen(kw_only=True)
class SpeedRecipe:
    """How the same formulas are computed faster. Each setting changes last bits of the result."""

    compile: Literal["off", "regional"] | Auto = "auto"
    """Compile each block of what is trained with `torch.compile`. The first steps take minutes
    longer. "auto": off."""
    attention: AttentionKernel | Auto = "auto"
    """Kernel of the attention of what is trained. "native": the fastest of PyTorch's own that fits;
    "native-..." one of them; the others are packages of their own. "auto": native."""
    tf32: bool = False
    """On CUDA: round the factors of float32 products to 10 bits (TF32), which is much faster."""
    channels_last: bool = False
    """Of a UNet: keep the channels of a place side by side in memory, which the convolutions of
    CUDA devices in 16 bits are fastest with."""


@frozen(kw_only=True)
class TextRecipe:
    """How prompts are encoded."""

    max_length: Annotated[int, Range(ge=1, le=4096)] | Auto = "auto"
    """Tokens of the longest encoder. "auto": as the family's pipeline does at inference."""
    instruction: bool | Auto = "auto"
    """Put the family's instruction before each prompt, where it has one."""


@frozen(kw_only=True)
class CropRecipe:
    """How a picture is cut to its bucket."""

    style: Literal["center", "corner", "random", "face", "saliency"] = "center"
    """Where the cut lies. "random" is drawn once for each image, because latents are cached. "face"
    and "saliency" look at the pixels, and need OpenCV: `pip install tuner[crop]`."""
    aspect: Literal["square", "preserve", "closest", "random"] = "preserve"
    """Cut squares, or keep the aspect ratio as nearly as the bucket allows, or take the nearest of
    `buckets`, or one drawn once for each image."""
    buckets: tuple[str, ...] = ()
    """Aspect ratios as "WIDTH:HEIGHT", of aspect "closest" and "random"."""
    resize: Literal["cover", "none"] = "cover"
    """Scale each image to cover its bucket and cut off the rest; "none": cut the bucket out of the
    image at its own size."""


@frozen(kw_only=True)
class CaptionsRecipe:
    """Where captions come from."""

    source: Literal["textfile", "filename", "instance", "json", "column"] = field(
        default="textfile", metadata={"key": "from"}
    )
    """A .txt or .json file beside each image, the file's name, one prompt for all, or a column of
    the table or shard, which is the default for those."""
    prompt: str = ""
    """The prompt of `from = "instance"`, and of `missing = "instance"`."""
    key: str = "caption"
    """Of `from = "json"`: the entry that holds a caption or a list of captions."""
    column: str = "text"
    """Of `from = "column"`: the column that holds a caption or a list of captions."""
    fallback: tuple[str, ...] = ()
    """Of `from = "column"`: columns to take where that one is empty, in this order."""
    missing: Literal["error", "skip", "empty", "filename", "instance"] = "error"
    """What to do with an image that has no caption or an empty one. "empty": train it with the
    empty prompt; "filename" and "instance": take that caption instead."""
    multiline: Literal["join", "first", "alternatives"] = "join"
    """Several lines are one caption, or only the first one counts, or each is a caption of its own,
    one of which is drawn at each use."""
    prefix: str = ""
    """Put before each caption, with a space between."""
    suffix: str = ""
    """Put behind each caption."""
    trigger: str = ""
    """The word that stands for what is learned. It takes the place of `[trigger]` in captions; you
    are warned of captions that do not say it."""
    shuffle: bool = False
    """Shuffle the tags of a caption. Needs `variants`, because embeddings are cached."""
    keep_tokens: Count = 0
    """So many tags at the front keep their place and are never dropped."""
    separator: Annotated[str, Length(ge=1)] = ","
    """What stands between tags."""
    tag_dropout: Probability = 0.0
    """Share of tags that are left out. Needs `variants`, because embeddings are cached."""
    variants: Annotated[int, Range(ge=1, le=1000)] = 1
    """How many shuffled forms of each caption are cached; one of them is drawn at each use."""
    dropout: Probability = 0.0
    """Share of samples that are trained with the empty prompt, for guidance."""


@frozen(kw_only=True)
class RegularisationRecipe:
    """Prior preservation (DreamBooth, arXiv 2208.12242)."""

    weight: PositiveFloat = 1.0
    """The loss of each of these samples is multiplied by it."""
    target: Literal["image", "base"] = "image"
    """What is learned of these samples: the images themselves, or what the frozen base predicts, so
    that the adapter leaves them as they were. "base" costs one more forward pass for them."""


@frozen(kw_only=True)
class MaskRecipe:
    """Which part of each image is learned: white of a mask is, black is not. The loss is averaged
    over that part, so that a small one weighs as much as a whole image."""

    source: Literal["alpha", "file"] = field(metadata={"key": "from"})
    """The image's own transparency (one without any is learned whole), or a file for each."""
    folder: str = ""
    """Of `from = "file"`: where masks lie, each called as its image (relative to the recipe). By
    default beside the images, told from them by `suffix`."""
    suffix: str = ""
    """Of `from = "file"`: what stands behind the image's name in the mask's: "-mask" for
    dog-mask.png beside dog.jpg."""
    floor: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """What the rest of the image counts, beside 1 for what the mask shows."""
    missing: Literal["error", "whole"] = "error"
    """Of `from = "file"`: what to do with an image that has no mask. "whole": learn all of it."""


@frozen(kw_only=True)
class SourceRecipe:
    """One data source. What is left out is taken from `[data]`."""

    path: str
    """A folder of images, or of shards; a .tar (be it compressed), .parquet, .arrow, .jsonl or .csv
    file, or a pattern with `*` for several (relative to the recipe); `hub:owner/name` for a data
    set of the hub, or the URL of a store (`s3://bucket/folder`), which `tuner run` copies."""
    id: str = ""
    """Its name in the plan; by default the folder's."""
    format: Literal["auto", "folder", "webdataset", "parquet", "arrow", "table"] = "auto"
    """What lies at `path`. "auto": as the files' endings say."""
    files: tuple[str, ...] = ()
    """Of a folder or a hub data set: only these tars, shards or tables, as names or patterns below
    it."""
    image: str = "auto"
    """Of shards and tables: the column with the image, its path or its URL. "auto": the one that is
    called like it."""
    repeats: Annotated[float, Range(gt=0, le=1_000_000)] = 1.0
    """Passes over the source in each epoch; fractions are allowed."""
    weight: PositiveFloat | None = None
    """Instead of `repeats`, for all sources: they are seen in the ratio of their weights, and an
    epoch is as long as it takes to see each image at least once."""
    regularisation: RegularisationRecipe | None = None
    """These are images of the class, not of the subject, so that the class is not forgotten."""
    start: Interval | None = field(default=None, metadata={"key": "from"})
    """When it joins: after so many steps or epochs, at the next epoch that begins."""
    until: Interval | None = None
    """When it leaves: after so many steps or epochs, at the next epoch that begins."""
    mask: MaskRecipe | Literal["none"] | None = None
    """Learn only a part of each image. "none": all of it, whatever `[data]` says."""
    holdout: Annotated[float, Range(ge=0, le=1_000_000)] = 0.0
    """Images that are not trained on: a share below 1, or a whole number of them."""
    resolution: PositiveFloat | tuple[PositiveFloat, ...] | None = None
    """Pixels (megapixels for resolution_type = "area"). Of a list, each image is a sample of
    each."""
    resolution_type: Literal["pixel", "area", "pixel_area"] | None = None
    """Whether `resolution` is the short edge, the area in megapixels, or the root of the area."""
    crop: CropRecipe | None = None
    """How pictures are cut."""
    captions: CaptionsRecipe | None = None
    """Where captions come from."""
    min_size: Count | None = None
    """Skip images whose shorter edge has fewer pixels."""
    max_size: Count | None = None
    """Of `resize = "none"`: bring larger images down to a shorter edge of this many pixels before
    they are cut. 0: don't."""
    min_aspect: PositiveFloat | None = None
    """Skip images whose width over height is less."""
    max_aspect: PositiveFloat | None = None
    """Skip images whose width over height is more."""
    upscale: bool | None = None
    """Enlarge images that are smaller than their bucket; false: skip them."""
    flip: bool | None = None
    """Train each image mirrored too, as a sample of its own."""
    broken: Literal["error", "skip"] | None = None
    """What to do with files that are no readable image."""


@frozen(kw_only=True)
class DataRecipe:
    """Data sources and the defaults for all of them."""

    source: tuple[SourceRecipe, ...]
    """The sources, one `[[data.source]]` each."""
    resolution: PositiveFloat | tuple[PositiveFloat, ...] | Auto = "auto"
    """Pixels (megapixels for resolution_type = "area"). "auto": the size the base was made for. Of
    a list, each image is a sample of each."""
    resolution_type: Literal["pixel", "area", "pixel_area"] = "pixel_area"
    """Whether `resolution` is the short edge, the area in megapixels, or the root of the area."""
    multiple: Annotated[int, Range(ge=1, le=1024)] | Auto = "auto"
    """Bucket edges are multiples of this many pixels. "auto": 64, or what the family needs."""
    crop: CropRecipe = field(factory=CropRecipe)
    """How pictures are cut."""
    captions: CaptionsRecipe = field(factory=CaptionsRecipe)
    """Where captions come from."""
    mask: MaskRecipe | None = None
    """Learn only a part of each image."""
    min_size: Count = 0
    """Skip images whose shorter edge has fewer pixels."""
    max_size: Count = 0
    """Of `resize = "none"`: bring larger images down to a shorter edge of this many pixels before
    they are cut. 0: don't."""
    min_aspect: PositiveFloat | None = None
    """Skip images whose width over height is less."""
    max_aspect: PositiveFloat | None = None
    """Skip images whose width over height is more."""
    upscale: bool = True
    """Enlarge images that are smaller than their bucket; false: skip them."""
    flip: bool = False
    """Train each image mirrored too, as a sample of its own."""
    broken: Literal["error", "skip"] = "error"
    """What to do with files that are no readable image."""
    workers: Annotated[int, Range(ge=1, le=256)] | Auto = "auto"
    """Threads that decode and resize."""


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
    weight_decay: Annotated[float, Range(ge=0)] | None = None
    """Weight decay; decoupled from the gradient, except in "adam", "adagrad" and "sgd"."""
    momentum: Beta | None = None
    """Share of the last update that is added to the next."""
    nesterov: bool | None = None
    """Look one update ahead (Nesterov's momentum)."""
    lr_decay: Annotated[float, Range(ge=0)] | None = None
    """Of "adagrad": the learning rate falls as 1 / (1 + lr_decay x step)."""
    beta2_decay: Annotated[float, Range(ge=-1, lt=0)] | None = None
    """Of "adafactor": the second moment's decay is 1 - step^beta2_decay."""
    clip_threshold: PositiveFloat | None = None
    """Of "adafactor" and "came": root mean square of a weight's update at most."""
    ns_steps: Annotated[int, Range(ge=1, le=99)] | None = None
    """Of "muon": Newton-Schulz iterations."""
    k: Annotated[int, Range(ge=1, le=1_000_000)] | None = None
    """Of "ranger": steps between two looks ahead."""
    alpha: Annotated[float, Range(ge=0)] | None = None
    """Of "ranger": share of the look ahead. Of "ademamix": weight of the slow average."""
    t_alpha_beta3: Annotated[int, Range(ge=1, le=100_000_000)] | None = None
    """Of "ademamix": steps over which the slow average is brought in."""
    t_alpha: Annotated[int, Range(ge=1, le=100_000_000)] | None = None
    """Of "bnb-ademamix": steps over which the slow average's weight rises."""
    t_beta3: Annotated[int, Range(ge=1, le=100_000_000)] | None = None
    """Of "bnb-ademamix": steps over which the slow average becomes slow."""
    r: Annotated[float, Range(ge=0)] | None = None
    """Of schedule-free ones: later steps count more in the average, by this power."""
    weight_lr_power: Annotated[float, Range(ge=0)] | None = None
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
    shift: PositiveFloat | Literal["auto", "resolution"] = "auto"
    """sigma = shift s / (1 + (shift - 1) s) with s = 1 - u. "auto": as the base's scheduler.
    "resolution": from the number of a picture's tokens, by the family's own rule."""
    mean: float = 0.0
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
    """Least noise that is trained, as sigma after the shift. Inside `min` and `max` the density
    keeps its shape."""
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
    max_grad_norm: Annotated[float, Range(ge=0)] = 1.0
    """Clip gradients to this global L2 norm; 0 does not clip."""
    timesteps: TimestepsRecipe = field(factory=TimestepsRecipe)
    """At which noise levels the model is trained."""
    loss: LossRecipe = field(factory=LossRecipe)
    """The loss."""
    noise: NoiseRecipe = field(factory=NoiseRecipe)
    """The noise."""
    guidance: Annotated[float, Range(ge=0)] | Auto = "auto"
    """The guidance scale that a model which was distilled from guidance (Flux dev) is told while it
    is trained. "auto": 1."""
    ema: EmaRecipe | None = None
    """Keep an exponential moving average."""
    guard: GuardRecipe = field(factory=GuardRecipe)
    """What to do when a loss or a gradient is not finite."""


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
    """Draw the untrained model's pictures first, to set beside."""
    negative: str = ""
    """The negative prompt."""
    sizes: Annotated[tuple[str, ...], Length(ge=1)] | Auto = "auto"
    """"WIDTHxHEIGHT" each. "auto": the training resolution, square."""
    guidance: Annotated[float, Range(ge=0)] | Auto = "auto"
    """Classifier-free guidance scale."""
    steps: Annotated[int, Range(ge=1, le=1000)] | Auto = "auto"
    """Sampling steps."""
    scheduler: Literal["auto", "euler", "euler-ancestral", "heun", "ddim", "dpm++", "unipc"] = (
        "auto"
    )
    """What samples. "auto": the base's own scheduler, as at inference."""
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
    """An address (https) that is told as JSON when the run begins, ends or fails."""


@frozen(kw_only=True)
class CacheRecipe:
    """Cached latents and text embeddings."""

    path: str = ""
    """Folder (relative to the recipe); by default the user's cache folder. Shared by all runs."""
    precision: Format | Auto = "auto"
    """Number format of what is cached."""


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
    mean: float = 0.2
    """Of log(sigma_data tan t), normal: the student's angles t. More is more noise."""
    std: PositiveFloat = 1.6
    """Its deviation."""
    discriminator_mean: float = -0.6
    """The same of the noise under which the discriminator judges."""
    discriminator_std: PositiveFloat = 1.0
    """Its deviation."""
    tangent_warmup: Annotated[int, Range(ge=0, le=100_000_000)] = 4000
    """Steps over which the part of the loss that rests on the forward derivative grows in."""
    consistency_weight: Annotated[float, Range(ge=0)] = 1.0
    """Of the consistency loss."""
    adversarial_weight: Annotated[float, Range(ge=0)] = 0.5
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


@frozen(kw_only=True)
class Recipe:
    """A training recipe."""

    schema: Annotated[int, Range(ge=1, le=1)] = 1
    """Version of the recipe language."""
    extends: str = ""
    """A recipe file or `preset:NAME` that this one differs from; this one's values win."""
    name: str
    """Of the run; also its folder below `runs`."""
    seed: Seed = 0
    """All randomness follows from it."""
    output: str = "runs"
    """Folder for run folders (relative to the recipe)."""
    model: ModelRecipe
    """The base model."""
    adapter: AdapterRecipe | None = None
    """An adapter on the frozen base; absent: a full fine-tune."""
    sprint: SprintRecipe | None = None
    """Distil the base into few steps; absent: it is trained as it is."""
    memory: MemoryRecipe = field(factory=MemoryRecipe)
    """What the run may use."""
    precision: PrecisionRecipe = field(factory=PrecisionRecipe)
    """Number formats."""
    speed: SpeedRecipe = field(factory=SpeedRecipe)
    """How the same formulas are computed faster."""
    text: TextRecipe = field(factory=TextRecipe)
    """How prompts are encoded."""
    data: DataRecipe
    """What it is trained on."""
    train: TrainRecipe
    """The training run."""
    checkpoints: CheckpointsRecipe = field(factory=CheckpointsRecipe)
    """What is kept to go on from."""
    validation: ValidationRecipe = field(factory=ValidationRecipe)
    """Pictures drawn while training."""
    evaluation: EvaluationRecipe = field(factory=EvaluationRecipe)
    """The loss of what is held out."""
    track: TrackRecipe = field(factory=TrackRecipe)
    """Where metrics go."""
    publish: PublishRecipe = field(factory=PublishRecipe)
    """Where the result goes."""
    cache: CacheRecipe = field(factory=CacheRecipe)
    """Cached latents and text embeddings."""
    launch: LaunchRecipe = field(factory=LaunchRecipe)
    """Where it runs."""
