"""The kinds of adapter: what each is, what it can be told, and where its files load.

Sources are the papers named beside each, and peft 0.21, whose layers train them. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING, Literal

from attrs import frozen

if TYPE_CHECKING:
    from compiler.plan import Adapter, Ranked

AdapterKind = Literal[
    "lora",
    "dora",
    "dylora",
    "lokr",
    "loha",
    "glora",
    "ia3",
    "full",
    "oft",
    "boft",
    "textual-inversion",
]
Init = Literal["gaussian", "kaiming", "orthogonal", "pissa", "olora"]

OF_THE_BASE: frozenset[Init] = frozenset({"pissa", "olora"})
"""Starts that take a part of the base's weights over, which then is missing there."""
CLIP_TARGETS: Mapping[str, tuple[str, ...]] = {
    "attention": (r".*\.self_attn\.(q|k|v|out)_proj",),
    "all-linear": (r".*\.self_attn\.(q|k|v|out)_proj", r".*\.mlp\.fc[12]"),
}
"""Layers of a CLIP (transformers' modeling_clip.py), by the names of `targets` in
[train.text_encoders]."""


@frozen(kw_only=True)
class AdapterFacts:
    """One kind. `weight` is the weight that takes the place of W; s is alpha / rank, and alpha /
    sqrt(rank) where `scaling = "sqrt-rank"`."""

    kind: AdapterKind
    title: str
    paper: str
    weight: str
    keys: tuple[str, ...]  # of `[adapter]`, besides those that all kinds have
    inits: tuple[Init, ...]  # the first is the default; (): it has one start
    kernels: bool  # adapts convolutions of more than one pixel
    count: str  # parameters of one module, of `inputs` (times pixels of the kernel) and `outputs`
    file: str  # the result's, which `loads` reads
    loads: str
    turns_input: bool = False  # the layer below is given another input than the one that has it

    @property
    def ranked(self) -> bool:
        """Whether the size of its update is a rank."""
        return "rank" in self.keys

    @property
    def blocked(self) -> bool:
        """Whether it is that of the blocks that it rotates."""
        return "block_size" in self.keys and not self.ranked


COMMON = ("kind", "targets", "exclude", "from")
RANKED = ("rank", "alpha", "ranks", "alphas")
LORA_FILE = "pytorch_lora_weights.safetensors"
LYCORIS_FILE = "lycoris.safetensors"
PEFT_FILE = "adapter_model.safetensors"
EMBEDDINGS_FILE = "learned_embeds.safetensors"
INVERSION: AdapterKind = "textual-inversion"
LYCORIS_LOADS = "ComfyUI where it knows the family; lycoris-lora's `create_lycoris_from_weights`"
PEFT_LOADS = "peft's `PeftModel.from_pretrained`"

ADAPTERS: Mapping[AdapterKind, AdapterFacts] = {
    row.kind: row
    for row in (
        AdapterFacts(
            kind="lora",
            title="LoRA",
            paper="arXiv 2106.09685",
            weight="W + s B A",
            keys=(*RANKED, "scaling", "dropout", "init", "min_rank"),
            inits=("gaussian", "kaiming", "orthogonal", "pissa", "olora"),
            kernels=True,
            count="rank * (inputs + outputs)",
            file=LORA_FILE,
            loads="Diffusers' `load_lora_weights`",
        ),
        AdapterFacts(
            kind="dora",
            title="DoRA",
            paper="arXiv 2402.09353",
            weight="m V / |V| with V = W + s B A, norms of its rows",
            keys=(*RANKED, "scaling", "dropout", "init"),
            inits=("gaussian", "kaiming"),
            kernels=True,
            count="rank * (inputs + outputs) + outputs",
            file=LORA_FILE,
            loads="Diffusers' `load_lora_weights`",
        ),
        AdapterFacts(
            kind="dylora",
            title="DyLoRA",
            paper="arXiv 2210.07558",
            weight="W + s B A; a step has the first b rows of A and columns of B, with b for the "
            "rank in s, and trains the last `block_size` of them",
            keys=(*RANKED, "scaling", "dropout", "init", "block_size"),
            inits=("gaussian", "kaiming"),
            kernels=True,
            count="rank * (inputs + outputs)",
            file=LORA_FILE,
            loads="Diffusers' `load_lora_weights`",
        ),
        AdapterFacts(
            kind="lokr",
            title="LoKr",
            paper="arXiv 2309.14859",
            weight="W + s (C kron B A), Kronecker's product",
            keys=(
                *RANKED,
                "rank_dropout",
                "module_dropout",
                "factor",
                "decompose_both",
                "full_matrix",
                "tucker",
                "weight_decompose",
                "train_norm",
            ),
            inits=(),
            kernels=True,
            count="",  # by how the sizes divide
            file=LYCORIS_FILE,
            loads=LYCORIS_LOADS,
        ),
        AdapterFacts(
            kind="loha",
            title="LoHa",
            paper="arXiv 2108.06098",
            weight="W + s (B1 A1) (B2 A2), each number times the other",
            keys=(
                *RANKED,
                "rank_dropout",
                "module_dropout",
                "tucker",
                "weight_decompose",
                "train_norm",
            ),
            inits=(),
            kernels=True,
            count="2 * rank * (inputs + outputs)",
            file=LYCORIS_FILE,
            loads=LYCORIS_LOADS,
        ),
        AdapterFacts(
            kind="glora",
            title="GLoRA",
            paper="arXiv 2306.07967",
            weight="W + s (W A1 A2 + B1 B2)",
            keys=(*RANKED, "train_norm"),
            inits=(),
            kernels=False,
            count="rank * (3 * inputs + outputs)",
            file=LYCORIS_FILE,
            loads=LYCORIS_LOADS,
            turns_input=True,
        ),
        AdapterFacts(
            kind="ia3",
            title="(IA)^3",
            paper="arXiv 2205.05638",
            weight="l W and l b, a factor l for each row",
            keys=(),
            inits=(),
            kernels=True,
            count="outputs",
            file=PEFT_FILE,
            loads=PEFT_LOADS,
        ),
        AdapterFacts(
            kind="full",
            title="full-matrix adapter",
            paper="LyCORIS' `full`",
            weight="W + D",
            keys=("train_norm",),
            inits=(),
            kernels=True,
            count="inputs * outputs",
            file=LYCORIS_FILE,
            loads=LYCORIS_LOADS,
        ),
        AdapterFacts(
            kind="oft",
            title="OFT",
            paper="arXiv 2306.07280",
            weight="W R, with R rotations of blocks of the inputs",
            keys=("block_size", "block_share", "dropout"),
            inits=(),
            kernels=False,
            count="(1 if block_share else inputs // block_size) * block_size * (block_size - 1)"
            " // 2",
            file=PEFT_FILE,
            loads=PEFT_LOADS,
            turns_input=True,
        ),
        AdapterFacts(
            kind="boft",
            title="BOFT",
            paper="arXiv 2311.06243",
            weight="d W R, with R products of rotations of blocks and d a factor for each row",
            keys=("block_size", "butterfly_factors", "dropout"),
            inits=(),
            kernels=False,
            count="butterfly_factors * inputs * block_size + outputs",
            file=PEFT_FILE,
            loads=PEFT_LOADS,
            turns_input=True,
        ),
        AdapterFacts(
            kind=INVERSION,
            title="textual inversion",
            paper="arXiv 2208.01618",
            weight="W; new tokens of the text encoders are all that is learned",
            keys=(),
            inits=(),
            kernels=False,
            count="",
            file=EMBEDDINGS_FILE,
            loads="Diffusers' `load_textual_inversion`",
        ),
    )
}
LAYERED: tuple[AdapterKind, ...] = tuple(kind for kind in ADAPTERS if kind != INVERSION)
"""Kinds that change layers of the model."""
LORAS: tuple[AdapterKind, ...] = tuple(k for k, row in ADAPTERS.items() if row.file == LORA_FILE)
"""Kinds whose file is a LoRA's."""
PLAIN: tuple[AdapterKind, ...] = tuple(kind for kind in LORAS if kind != "dora")
"""Kinds of them whose file holds nothing but a LoRA's two matrices."""


def rule_of(adapter: Adapter, module: str) -> Ranked | None:
    """The first pattern of `ranks` that matches `module`; None where `rank` holds."""
    return next((r for r in adapter.ranks if re.fullmatch(r.pattern, module)), None)


def rank_of(adapter: Adapter, module: str) -> int:
    """The rank of the adapter of `module`: by the first pattern of `ranks` that matches it."""
    rule = rule_of(adapter, module)
    return adapter.rank if rule is None else rule.rank


def alpha_of(adapter: Adapter, module: str) -> float:
    """The alpha of the adapter of `module`."""
    found = (a.alpha for a in adapter.alphas if re.fullmatch(a.pattern, module))
    return next(found, adapter.alpha)


def scale_of(adapter: Adapter, module: str, rank: int = 0) -> float:
    """The factor s by which the update of `module` counts, or would with another `rank`.
    Rank-stabilised LoRA (arXiv 2312.03732) divides by the root of the rank, so that large ranks
    don't learn less."""
    rank, alpha = rank or rank_of(adapter, module), alpha_of(adapter, module)
    return alpha / (sqrt(rank) if adapter.scaling == "sqrt-rank" else rank)


def described(adapter: Adapter) -> str:
    """In words: "LoRA of rank 16"."""
    row = ADAPTERS[adapter.kind]
    if adapter.kind == INVERSION:
        return row.title
    if not row.ranked:
        return f"{row.title} of blocks of {adapter.block_size}" if row.blocked else row.title
    several = " and others" if adapter.ranks else ""
    masked = f", of {adapter.min_rank} at full noise" if adapter.min_rank else ""
    return f"{row.title} of rank {adapter.rank}{several}{masked}"


def result_name(adapter: Adapter | None) -> str:
    """The result's folder within that of the run."""
    return "model" if adapter is None else adapter.kind


RESULTS = ("model", *ADAPTERS)
