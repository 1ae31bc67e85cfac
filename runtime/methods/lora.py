"""Adapters: LoRA and its kin on a frozen base. `compiler.adapters` holds their formulas and papers.

peft holds the layers, as in Diffusers; `runtime.methods.kinds` says how each kind starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compiler.adapters import ADAPTERS, INVERSION
from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from compiler.plan import Adapter, Model, Precision
from runtime.families.base import Family
from runtime.families.common import DTYPES
from runtime.methods import adapter_files, embedding_files, text_files
from runtime.methods.adapter_files import PEFT_ROOT
from runtime.methods.base import Built, Grow, check_names, masters, state
from runtime.methods.kinds import PART, initialise, insert, parts_of
from runtime.methods.norms import insert_norms, norms_of
from runtime.methods.timed import mask_by_noise
from runtime.methods.updates import adapted_bias, adapted_weight
from runtime.new_tokens import FOLDER
from runtime.quantise.layers import num_weights, quantised_layers

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")


def prepare(
    model: nn.Module,
    adapter: Adapter,
    precision: Precision,
    seed: int,
    *,
    encoder: str = "",
    beside: Sequence[str] = (),
    family: str = "",
    grow: Grow | None = None,
) -> Built:
    """Freeze `model` and put the adapter on the modules that its patterns match.

    The start is a function of (seed, module name, shape) and of the base's weights, or is the file
    that the adapter names: what there is of the trained component, or of a text `encoder`, without
    the encoders `beside`; `family` tells how other programs call its layers. Raises ValueError if
    a pattern matches nothing, for sizes that don't fit, and for a file of another adapter; OSError.
    """
    count = num_weights(model)
    if adapter.kind == INVERSION:
        model.requires_grad_(False)
        return Built(
            model=model, trainable={}, parameters=count, adapted_modules=0, adapter=adapter
        )
    targets = targets_of(model, adapter)
    model.requires_grad_(False)
    norms = norms_of(model) if adapter.train_norm else []
    device = next(model.parameters()).device
    with device if device.type == "meta" else nullcontext():  # layers are made on the CPU first
        nested = insert(model, adapter, targets)
    if adapter.min_rank:
        mask_by_noise(model, adapter, targets, FAMILIES[family])
    insert_norms(model, norms)
    more = grow(model) if grow is not None else (0, 0)
    fresh = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in fresh.values():
        parameter.data = parameter.data.to(DTYPES[precision.compute])
    start = {name: p.detach().to(DTYPES[precision.trained]) for name, p in fresh.items()}
    trainable = masters(model, start)
    taken = initialise(
        model, trainable, adapter, seed, encoder=encoder, beside=beside, family=family
    )
    return Built(
        model=model,
        trainable=trainable,
        parameters=count + more[0],
        adapted_modules=len(targets) + len(norms) + more[1],
        adapter=adapter,
        taken=taken,
        nested=(nested,) if nested else (),
    )


def targets_of(model: nn.Module, adapter: Adapter) -> list[str]:
    """Names of the modules that carry the adapter, in the model's order.

    Raises ValueError, naming it, for a pattern that matches none.
    """
    kernels = ADAPTERS[adapter.kind].kernels
    found = matching(model, adapter.targets, kernels=kernels)
    for pattern in adapter.exclude:
        left = [name for name in found if not re.fullmatch(pattern, name)]
        if len(left) == len(found):
            near = _near(pattern, found)
            raise ValueError(f"`{pattern}` of `exclude` matches none of the targets{near}")
        found = left
    if not found:
        raise ValueError("`exclude` leaves nothing to adapt")
    for pattern in (*(r.pattern for r in adapter.ranks), *(a.pattern for a in adapter.alphas)):
        if not any(re.fullmatch(pattern, name) for name in found):
            near = _near(pattern, found)
            raise ValueError(f"`{pattern}` matches none of the {len(found)} adapted layers{near}")
    return found


def matching(model: nn.Module, patterns: tuple[str, ...], *, kernels: bool = False) -> list[str]:
    """Names of the linear layers that any of `patterns` matches in full, in the model's order.

    With `kernels` convolutions of several pixels count too. Raises ValueError.
    """
    test = is_dense if kernels else is_linear
    layers = [name for name, module in model.named_modules() if test(module)]
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in layers if re.fullmatch(pattern, name)}
        if not hits:
            near = ("" if kernels else _kernels(pattern, model)) or _near(pattern, layers)
            raise ValueError(f"`{pattern}` matches none of the {len(layers)} linear layers{near}")
        found |= hits
    return [name for name in layers if name in found]


def _kernels(pattern: str, model: nn.Module) -> str:
    """In words, how many convolutions of several pixels `pattern` matches; ""."""
    layers = [name for name, module in model.named_modules() if is_dense(module)]
    count = sum(1 for name in layers if re.fullmatch(pattern, name))
    why = "and an adapter of this kind has no form for them"
    return f"; it matches {count} convolutions of several pixels, {why}" if count else ""


def _near(pattern: str, names: Sequence[str]) -> str:
    """In words, which pattern would match whole `names` of which this one matches a part; ""."""
    part = f"({pattern})" if "|" in pattern else pattern
    part = re.escape(pattern) if re.fullmatch(r"[\w.]+", pattern) else part
    for whole in (rf"{part}\..*", rf".*\.{part}", rf".*\.{part}\..*", f".*{part}.*"):
        count = sum(1 for name in names if re.fullmatch(whole, name))
        if count:
            return f"; `{whole}` matches {count}"
    return ""


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies channels by one matrix: a linear layer or a 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def is_dense(module: nn.Module) -> bool:
    """Whether `module` is a linear layer or a convolution of all channels."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def export(
    built: Built,
    model: Model,
    family: Family,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapter into `folder` as the file that its kind has, see `compiler.adapters`; a
    LoRA as peft's, where the family's card says that the pipeline has no loader.

    It loads at the right strength on the base as it is published. `weights` replace the trained
    ones; `dtype` is by default what they are trained in.
    """
    adapter = built.adapter
    assert adapter is not None
    values = state(built) if weights is None else weights
    check_names(built, values)
    whole = adapter_files.given_back(values, built.taken)
    every = {k: v.to("cpu", dtype or v.dtype).contiguous() for k, v in whole.items()}
    facts = built.text.text if built.text else None
    words = built.text.embeddings if built.text else None
    if words is not None:
        place = folder if adapter.kind == INVERSION else folder / FOLDER
        embedding_files.write(every, words, family.card, place)
    if adapter.kind == INVERSION:
        return
    kept = text_files.of_model(every)
    tensors = adapter_files.laid_out(kept, adapter)
    folder.mkdir(parents=True, exist_ok=True)
    layout = adapter_files.layout_of(adapter, family.card)
    if layout == "lycoris":
        save_file(tensors, folder / ADAPTERS[adapter.kind].file, metadata={"format": "pt"})
    elif layout == "peft":
        _write_for_peft(tensors, adapter_files.peft_settings(kept, adapter), folder)
    else:
        beside = text_files.for_diffusers(every, facts) if facts else {}
        _write_for_diffusers(
            tensors, kept, adapter, model.trained_component, family, folder, beside
        )


def _write_for_diffusers(
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    adapter: Adapter,
    component: str,
    family: Family,
    folder: Path,
    beside: Mapping[str, Any],
) -> None:
    """`beside` are further arguments, of text encoders."""
    import diffusers

    arguments: dict[str, Any] = {
        f"{component}_lora_layers": dict(tensors),
        f"{component}_lora_adapter_metadata": adapter_files.peft_settings(values, adapter),
        **beside,
    }
    getattr(diffusers, family.card.pipeline).save_lora_weights(folder, **arguments)


def file_prefix(family: FamilyCard) -> str:
    """What `export` puts before the names of a LoRA's modules."""
    return f"{PEFT_ROOT if family.lora_loader == 'peft' else family.trained_component}."


def _write_for_peft(tensors: Mapping[str, Tensor], said: Mapping[str, Any], folder: Path) -> None:
    """As `PeftModel.save_pretrained`, whose model would be the trained component."""
    weights, config = PEFT_FILES
    named = {f"{PEFT_ROOT}.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / weights, metadata={"format": "pt"})
    text = json.dumps({**said, "inference_mode": True}, indent=2, sort_keys=True)
    (folder / config).write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def merged(
    built: Built, *, weights: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The trained component's tensors without adapter, by their plain names, one at a time.

    Computed in float32 and rounded once, to `dtype` or that of the base; quantised weights are
    turned back in float32 (nf4 levels and scales, nothing else, are then exact), so the result
    keeps what the adapter learned of their errors. `weights` replace the trained ones.
    """
    assert built.adapter is not None
    values = state(built) if weights is None else weights
    check_names(built, values)
    modules = parts_of(list(text_files.of_model(values)))
    quantised = dict(quantised_layers(built.model))
    for key, held in built.model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if PART.fullmatch(key) or (owner in quantised and leaf == "scales"):
            continue
        name = owner.removesuffix(".base_layer")
        of, tensor = held.dtype, held
        if owner in quantised and leaf == "codes":
            layer, leaf = quantised[owner], "weight"
            of, plain = layer.form.dtype, layer.weight.shape
            tensor = layer.dequantised(torch.float32).view(plain)
        if leaf in ("weight", "bias") and name in modules:
            parts = {part: values[full] for part, full in modules[name].items()}
            tensor = (
                adapted_weight(tensor, parts, built.adapter, name)
                if leaf == "weight"
                else adapted_bias(tensor, parts)
            )
        yield f"{name}.{leaf}" if name else leaf, tensor.to(dtype or of)
