"""peft's layers for each kind of adapter, and what their weights start from.

Starts are functions of (seed, module name, shape) and, for some of LoRA's, of the base's weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from compiler.adapters import (
    ADAPTERS,
    LORAS,
    OF_THE_BASE,
    alpha_of,
    rank_of,
    rule_of,
    scale_of,
)
from compiler.plan import Adapter
from runtime import rng
from runtime.methods.nested import Nested, nest
from runtime.quantise.layers import Quantised, unread

NAME = "default"  # peft's and Diffusers' own name for an adapter
KIND = "lora|lokr|hada|dora|glora|ia3|full|norm|oft|boft"  # how names of parts begin
PART = re.compile(rf"(.+)\.((?:{KIND})_\w+)\.{NAME}(?:\.weight)?")
WHOLE = 2**30  # a rank that no layer has
OVERSAMPLED = 10  # columns besides those that are wanted
FEW = 3  # patterns that a message may name
ITERATIONS = 4  # PiSSA's paper finds no gain from more


def parts_of(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Module -> part (`lora_A`) -> its name in training (`X.lora_A.default.weight`)."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = PART.fullmatch(name)
        assert match is not None, f"{name} is no adapter's"
        found.setdefault(match[1], {})[match[2]] = name
    return found


def insert(model: nn.Module, adapter: Adapter, targets: Sequence[str]) -> Nested | None:
    """Put an adapter on the modules called `targets`. Returns what draws its rank in each step,
    where that changes.

    Raises ValueError for blocks that a module's inputs can't be cut into, and for a rank that one
    has not, where the start is taken from its weights.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        # Layers that are left out by chance would be missing in the simulated step.
        adapter = evolve(adapter, module_dropout=0.0)
    if ADAPTERS[adapter.kind].blocked:
        for name in targets:
            _check_blocks(name, model.get_submodule(name), adapter)
    if adapter.init in OF_THE_BASE:
        _check_ranks(model, adapter, targets)
    if adapter.kind == "boft":
        from runtime.methods.boft import insert_boft

        insert_boft(model, adapter, targets)
        return None
    from runtime.methods.extra_layers import LAYERS, insert_extra

    if adapter.kind in LAYERS:
        insert_extra(model, adapter, targets)
        return None
    from peft import inject_adapter_in_model

    # Of DoRA, peft takes the base's magnitudes at once; else it asks where weights are.
    with nullcontext() if adapter.kind == "dora" else unread():
        # Not every class of Diffusers has `add_adapter`.
        inject_adapter_in_model(_config(adapter, targets), model, NAME)
    if adapter.weight_decompose:
        from runtime.methods.decomposed import decompose

        decompose(model, targets)
    return nest(model, adapter, targets) if adapter.kind == "dylora" else None


def _check_blocks(name: str, layer: nn.Module, adapter: Adapter) -> None:
    inputs, size = inputs_of(layer), adapter.block_size
    if inputs % size:
        good = [n for n in range(2, min(inputs, 129)) if inputs % n == 0]
        raise ValueError(
            f"the {inputs} inputs of `{name}` can't be cut into blocks of {size}; "
            f"block_size may be {', '.join(map(str, good))}"
        )
    factors = adapter.butterfly_factors
    if factors > 1 and inputs % (size * 2 ** (factors - 1)):
        raise ValueError(
            f"the {inputs} inputs of `{name}` are not enough for blocks of {size} in {factors} "
            "butterfly factors: give smaller blocks or fewer factors"
        )


def _check_ranks(model: nn.Module, adapter: Adapter, targets: Sequence[str]) -> None:
    """Names the least rank of all layers that `ranks` treats alike, and which layers have too small
    ones if a few patterns say that."""
    sizes = {name: _rank_of_layer(model.get_submodule(name)) for name in targets}
    small = [name for name, size in sizes.items() if rank_of(adapter, name) > size]
    if not small:
        return
    ruled = [rule_of(adapter, name) for name in small]
    alike = [name for name, rule in zip(small, ruled, strict=True) if rule == ruled[0]]
    worst = min(alike, key=lambda name: sizes[name])
    patterns = list(dict.fromkeys(map(_numberless, alike)))
    told = {name for name in targets if any(re.fullmatch(p, name) for p in patterns)}
    few = len(patterns) <= FEW and told == set(alike)
    raise ValueError(
        f"`{worst}` has {sizes[worst]} singular values for `{adapter.init}` to start from, not "
        f"{rank_of(adapter, worst)}: rank may be at most {sizes[worst]}"
        + (" in " + ", ".join(f"`{pattern}`" for pattern in patterns))
        * few
    )


def _rank_of_layer(layer: nn.Module) -> int:
    weight: Any = layer.weight
    return int(min(weight.flatten(1).shape))


def _numberless(name: str) -> str:
    """The pattern of a layer in any block."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def inputs_of(layer: nn.Module) -> int:
    """Channels that a linear layer or 1x1 convolution takes in."""
    channels: Any = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    return int(channels)


def _config(adapter: Adapter, targets: Sequence[str]) -> Any:
    """peft's configuration. Ranks are given by whole module names where they differ."""
    import peft

    from runtime.quantise.adapters import LORA_LAYERS

    common = {"target_modules": "|".join(re.escape(name) for name in targets)}
    if adapter.kind == "oft":
        return peft.OFTConfig(
            r=0,
            oft_block_size=adapter.block_size,
            block_share=adapter.block_share,
            module_dropout=adapter.dropout,
            **common,
        )
    ranks = {n: rank_of(adapter, n) for n in targets if rank_of(adapter, n) != adapter.rank}
    alphas = {n: alpha_of(adapter, n) for n in targets if alpha_of(adapter, n) != adapter.alpha}
    patterns = {
        "rank_pattern": {exactly(name): rank for name, rank in ranks.items()},
        "alpha_pattern": {exactly(name): alpha for name, alpha in alphas.items()},
    }
    if adapter.kind in LORAS:
        config = peft.LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            use_rslora=adapter.scaling == "sqrt-rank",
            use_dora=adapter.kind == "dora",
            init_lora_weights=True,  # drawn anew below, independent of torch's generator
            **common,
            **patterns,
        )
        config._register_custom_module(LORA_LAYERS)
        return config
    settings: dict[str, Any] = {
        "r": adapter.rank,
        "alpha": adapter.alpha,
        "rank_dropout": adapter.rank_dropout,
        "module_dropout": adapter.module_dropout,
        "use_effective_conv2d": adapter.tucker,
        **common,
        **patterns,
    }
    if adapter.full_matrix:  # peft decomposes where the rank is small enough
        scales = {name: scale_of(adapter, name) for name in targets}
        settings |= {"r": WHOLE, "alpha": WHOLE, "rank_pattern": {}}
        settings["alpha_pattern"] = {exactly(n): s * WHOLE for n, s in scales.items() if s != 1}
    if adapter.kind == "loha":
        return peft.LoHaConfig(**settings)
    return peft.LoKrConfig(
        decompose_factor=adapter.factor or -1, decompose_both=adapter.decompose_both, **settings
    )


def exactly(name: str) -> str:
    """A pattern of peft's that matches this module alone."""
    return f"^{re.escape(name)}"


@torch.no_grad()
def initialise(
    model: nn.Module,
    trainable: Mapping[str, Tensor],
    adapter: Adapter,
    seed: int,
    *,
    encoder: str = "",
    beside: Sequence[str] = (),
    family: str = "",
) -> dict[str, tuple[Tensor, Tensor]]:
    """Set the start of `trainable`; returns what was taken over from the base, by module.

    That is (B, A) of LoRA, float32 on the host: the base then holds W - s B A. Meta tensors stay.
    `encoder` and `beside` are as in `read_result`. Raises ValueError for a file to start from that
    is of another adapter, and OSError.
    """
    if adapter.start:
        from runtime.methods.adapter_files import check_start, is_for_comfyui, read_start

        config: Any = {} if encoder else getattr(model, "config", {})
        if any(tensor.is_meta for tensor in trainable.values()):
            check_start(adapter, list(trainable), family, config, encoder=encoder)
            return {}
        given = (adapter, trainable, family, config)
        found = read_start(*given, encoder=encoder, beside=beside)
        if is_for_comfyui(adapter):
            found |= _own_lengths(model, found, adapter)
        for name, tensor in found.items():
            trainable[name].copy_(tensor)
        return {}
    taken: dict[str, tuple[Tensor, Tensor]] = {}
    for module, parts in parts_of(list(trainable)).items():
        tensors = {part: trainable[name] for part, name in parts.items()}
        if any(tensor.is_meta for tensor in tensors.values()):
            continue
        if adapter.init in OF_THE_BASE:
            layer: Any = model.get_submodule(module)
            base = layer.get_base_layer().weight
            scale = scale_of(adapter, module)
            b, a = split(base.detach(), rank_of(adapter, module), scale, adapter.init, seed, module)
            tensors["lora_A"].copy_(a.view_as(tensors["lora_A"]))
            tensors["lora_B"].copy_(b.view_as(tensors["lora_B"]))
            base.copy_(base.float() - (scale * b @ a).view_as(base))
            taken[module] = (b.cpu(), a.cpu())
        elif adapter.init == "orthogonal":
            _orthogonal(tensors["lora_A"], tensors["lora_B"], seed, module)
        else:
            for part, tensor in tensors.items():
                _start(tensor, part, parts[part], adapter, seed)
    return taken


def _own_lengths(
    model: nn.Module, values: Mapping[str, Tensor], adapter: Adapter
) -> dict[str, Tensor]:
    """The lengths of rows of a file in which they are multiplied by |W| / |W + s B A|, see
    `runtime.export.dora`. Raises ValueError where W is not what it was."""
    from runtime.methods.updates import product

    own = "diffusers" if adapter.kind in LORAS else "lycoris"
    found = {}
    for module, parts in parts_of(list(values)).items():
        name = parts.get("lora_magnitude_vector", parts.get("dora_scale"))
        if name is None:
            continue
        base: Any = model.get_submodule(module).base_layer
        if isinstance(base, Quantised):
            raise ValueError(
                f"`{adapter.start}` has the lengths of rows that ComfyUI multiplies by, which "
                f"quantised weights don't tell exactly: export it with `--format {own}`"
            )
        before = base.weight.float().flatten(1)
        update = product({part: values[each].float() for part, each in parts.items()})
        after = before + scale_of(adapter, module) * update
        share = torch.linalg.vector_norm(after, dim=1) / torch.linalg.vector_norm(before, dim=1)
        lengths = values[name]
        found[name] = (lengths.float().flatten() * share).view(lengths.shape)
    return found


def split(
    weight: Tensor, rank: int, scale: float, init: str, seed: int, module: str
) -> tuple[Tensor, Tensor]:
    """B (outputs, rank) and A (rank, inputs), float32, of which s B A is the part of `weight` that
    the adapter takes over.

    PiSSA (arXiv 2404.02948, eq. 2 and 3) takes the largest singular values, found by subspace
    iteration (Halko et al., 2011, algorithm 4.4); OLoRA (arXiv 2406.01775) the first columns of Q
    and rows of R. Raises ValueError for a rank that the matrix does not have.
    """
    matrix = weight.float().flatten(1)
    if rank > min(matrix.shape):
        raise ValueError(
            f"`{module}` has no {rank} singular values to start from, only {min(matrix.shape)}: "
            "give it a smaller rank, or another `init`"
        )
    if init == "olora":
        q, r = torch.linalg.qr(matrix)
        return q[:, :rank].contiguous(), r[:rank].contiguous()
    columns = min(rank + OVERSAMPLED, *matrix.shape)
    drawn = rng.generator(seed, f"pissa {module}").standard_normal((matrix.shape[1], columns))
    basis = torch.linalg.qr(matrix @ torch.from_numpy(drawn).to(matrix)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return (basis @ u[:, :rank]) * root, root[:, None] * v[:rank]


def _orthogonal(a: Tensor, b: Tensor, seed: int, module: str) -> None:
    """A and B of which neither is zero, but B A is: their rows and columns lie in two halves of one
    orthogonal basis (peft's "orthogonal", with deviation 1/10)."""
    rank = a.shape[0]
    inputs, outputs = math.prod(a.shape[1:]), b.shape[0]
    generator = rng.generator(seed, f"lora {module}")
    basis = torch.linalg.qr(torch.from_numpy(generator.standard_normal((rank, rank)))).Q
    rows = torch.from_numpy(generator.standard_normal((inputs, rank // 2))) @ basis[0::2]
    columns = torch.from_numpy(generator.standard_normal((outputs, rank // 2))) @ basis[1::2]
    a.copy_(rows.T.reshape(a.shape) / 10)
    b.copy_(columns.reshape(b.shape) / 10)


ZERO = (
    "lora_B",
    "lokr_w2",
    "lokr_w2_b",
    "hada_w2_a",
    "glora_a2",
    "glora_b2",
    "full_diff",
    "norm_w",
    "norm_b",
    "oft_R",
    "boft_R",
)
"""What starts at zero, so that an untrained adapter changes nothing."""
DEVIATION = {"hada_t1": 0.1, "hada_t2": 0.1, "hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}
"""Of LoHa's normal numbers, as LyCORIS draws them."""


def _start(tensor: Tensor, part: str, name: str, adapter: Adapter, seed: int) -> None:
    if part in ZERO:
        tensor.zero_()
        return
    if part == "ia3_l":
        tensor.fill_(1)
        return
    if part in ("lora_magnitude_vector", "dora_scale", "boft_s"):
        return  # lengths of the base's rows, and ones
    shape = tuple(tensor.shape)
    generator = rng.generator(seed, f"lora {name}")
    if part in DEVIATION:
        values = generator.standard_normal(shape) * DEVIATION[part]
    elif part == "lora_A" and adapter.init == "gaussian":  # peft's: deviation 1 / rank
        values = generator.standard_normal(shape) / shape[0]
    else:  # peft's "kaiming": uniform with a = sqrt 5
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        values = generator.uniform(-bound, bound, shape)
    tensor.copy_(torch.from_numpy(values))
