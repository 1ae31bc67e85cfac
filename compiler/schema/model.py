"""What is trained, and how it fits: the model, the adapter, memory, precision, speed."""

from __future__ import annotations

from typing import Annotated, Literal

from attrs import field, frozen

from compiler.adapters import AdapterKind, Init
from compiler.plan import AttentionKernel
from compiler.schema.ranges import (
    Auto,
    Format,
    PositiveFloat,
    Rate,
)
from compiler.structure import Length, Range
from compiler.units import ByteSize, Share


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
    """A hub id, a folder in the Diffusers layout, or a safetensors file that holds a whole model
    (paths are relative to the recipe)."""
    rest: str = "auto"
    """Where what such a file lacks comes from (configurations, tokenizers, a missing component): a
    hub id that the family knows, or a folder. "auto": by the shapes of the file's tensors."""
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

    kind: AdapterKind
    """Low-rank adaptation (arXiv 2106.09685), the same with the lengths of rows apart ("dora",
    2402.09353), LoRA that can be cut to smaller ranks ("dylora", 2210.07558: a step trains a block
    of ranks on top of those before it), Kronecker's ("lokr", 2309.14859) and Hadamard's product
    ("loha", 2108.06098), two updates of which one is a product with the weight ("glora",
    2306.07967), a factor for each output ("ia3", 2205.05638), a whole matrix ("full"), or rotations
    of blocks ("oft", 2306.07280) and products of such ("boft", 2311.06243). "textual-inversion"
    (2208.01618) leaves the model as it is and learns the new tokens of `[embeddings]` alone."""
    rank: Annotated[int, Range(ge=1, le=16_384)] = 16
    """Rank of the update."""
    alpha: PositiveFloat | Auto = "auto"
    """The update is scaled by alpha / rank. "auto": alpha = rank."""
    ranks: dict[str, Annotated[int, Range(ge=1, le=16_384)]] = field(factory=dict)
    """Module name pattern -> rank, where it is not `rank`. The first that matches counts."""
    min_rank: Annotated[int, Range(ge=1, le=16_384)] | None = None
    """Of "lora": train and draw with this rank where all is noise, and with more of `rank` the less
    noise there is (T-LoRA, arXiv 2507.05964), against learning few pictures by heart. Programs that
    load the file know nothing of it. By default `rank` at all noise levels."""
    alphas: dict[str, PositiveFloat] = field(factory=dict)
    """Module name pattern -> alpha, where it is not `alpha`."""
    scaling: Literal["rank", "sqrt-rank"] = "rank"
    """Of "lora", "dora" and "dylora": scale by alpha / rank, or by alpha / sqrt(rank), which keeps
    large ranks from learning less (rsLoRA, arXiv 2312.03732)."""
    dropout: Rate = 0.0
    """Dropout on the input of "lora", "dora" and "dylora"; share of the blocks that "oft" and
    "boft" leave unrotated in a step."""
    rank_dropout: Rate = 0.0
    """Of "lokr" and "loha": chance of each row of the update to be left out in a step."""
    module_dropout: Rate = 0.0
    """Of "lokr" and "loha": chance of a layer to go without its update in a step."""
    init: Init = "gaussian"
    """Of "lora", "dora" and "dylora": how the first matrix starts (the second one starts at zero).
    Of "lora": "orthogonal" starts both so that their product is zero; "pissa" (arXiv 2404.02948)
    starts with the largest singular values of the base's weights and "olora" (2406.01775) with
    their QR decomposition, both of which the result gives back to the base."""
    factor: Annotated[int, Range(ge=2, le=65_536)] | None = None
    """Of "lokr": edges are split into two numbers, one of which is near to this; by default both
    are near to the root."""
    decompose_both: bool = False
    """Of "lokr": decompose the first matrix too where `rank` is small enough."""
    full_matrix: bool = False
    """Of "lokr": keep both matrices whole, whatever `rank` is."""
    tucker: bool = False
    """Of "lokr" and "loha": on convolutions of several pixels, the kernel is a tensor of its own
    between two matrices (Tucker's decomposition), which takes fewer parameters."""
    weight_decompose: bool = False
    """Of "lokr" and "loha": learn the lengths of the weight's rows apart, as "dora" does (LyCORIS'
    `dora_wd`)."""
    train_norm: bool = False
    """Of "lokr", "loha", "glora" and "full": train weights and biases of all layer norms and group
    norms too (LyCORIS' key of this name). Most transformers have none, UNets have many."""
    block_size: Annotated[int, Range(ge=1, le=16_384)] | None = None
    """Of "oft" and "boft", which have no rank: inputs that are rotated together. Must divide their
    number. By default 32 and 8. Of "dylora": ranks that a step trains together; divides `rank`. By
    default the largest of 4, 2 and 1 that does."""
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
    run's result folder or `tuner export` has it, or with the keys of sd-scripts or ComfyUI."""


@frozen(kw_only=True)
class NewTokenRecipe:
    """A new word of the text encoders, to be used in captions and prompts."""

    name: str
    """The word, in angle brackets: "<k4s4>". What stands in them also names a file."""
    vectors: Annotated[int, Range(ge=1, le=64)] = 1
    """So many tokens it takes of a prompt's 77. More can say more."""
    initial: str = ""
    """A text whose tokens' vectors it starts from, such as "white cat". "": random ones of the
    table's own spread."""
    from_: str = field(default="", metadata={"key": "from"})
    """A file of this word's vectors to start from (relative to the recipe), as a run leaves it or a
    LoRA's file holds it. Where the adapter starts from a file, the words that lie with it are taken
    by themselves."""


@frozen(kw_only=True)
class EmbeddingsRecipe:
    """New words for the CLIP text encoders (textual inversion, arXiv 2208.01618): learned alone
    with `[adapter] kind = "textual-inversion"`, or together with another adapter (pivotal tuning).
    """

    token: Annotated[tuple[NewTokenRecipe, ...], Length(ge=1)]
    """The words."""
    lr: PositiveFloat | Auto = "auto"
    """Their learning rate, on the same schedule. "auto": as `[train.optimizer]`. They want more
    than an adapter does: 1e-3 is usual."""
    until: Share = field(factory=lambda: Share.parse("100%"))
    """After so much of the run they stay as they are."""


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
    the same. Needs `max_grad_norm = 0` and no accumulation."""
    offload: OffloadRecipe | Literal["auto", "none"] = field(factory=OffloadRecipe)
    """What waits in host memory until it is needed. Results stay the same: only bits move."""
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
    fused_projections: bool = False
    """Compute queries, keys and values of an attention by one product instead of three. What is
    saved does not change."""


@frozen(kw_only=True)
class TextRecipe:
    """How prompts are encoded."""

    max_length: Annotated[int, Range(ge=1, le=4096)] | Auto = "auto"
    """Tokens of the longest encoder. "auto": as the family's pipeline does at inference."""
    instruction: bool | Auto = "auto"
    """Put the family's instruction before each prompt, where it has one."""
