"""LoRA (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685).

W x + (alpha / rank) B A x with W frozen; peft holds the layers, as in Diffusers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compiler.families.card import FamilyCard
from compiler.plan import Adapter, Model, Precision
from runtime import rng
from runtime.families.base import Family
from runtime.families.common import DTYPES
from runtime.methods.base import Built, check_names, masters, state
from runtime.quantise.layers import num_weights, quantised_layers

NAME = "default"  # peft's and Diffusers' own name for an adapter
PEFT_ROOT = "base_model.model"  # what peft's own files put before a module's name
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")


def prepare(model: nn.Module, adapter: Adapter, precision: Precision, seed: int) -> Built:
    """Freeze `model` and put the adapter on the modules that its patterns match.

    The start is a function of (seed, module name, shape): matrix A as `init` says, B zero. Raises
    ValueError if a pattern matches no linear layer or 1x1 convolution.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from runtime.quantise.adapters import LORA_LAYERS

    count = num_weights(model)
    targets = matching(model, adapter.targets)
    model.requires_grad_(False)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        init_lora_weights=True,  # drawn anew below, independent of torch's generator
        target_modules="|".join(re.escape(name) for name in targets),
    )
    config._register_custom_module(LORA_LAYERS)
    inject_adapter_in_model(config, model, NAME)  # not every class of Diffusers has `add_adapter`
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.to(DTYPES[precision.compute])
    trained = DTYPES[precision.trained]
    start = {n: p.detach().to(trained) for n, p in model.named_parameters() if p.requires_grad}
    trainable = masters(model, start)
    _initialise(trainable, adapter, seed)
    return Built(model=model, trainable=trainable, parameters=count, adapted_modules=len(targets))


def matching(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the linear layers that any of `patterns` matches in full, in the model's order."""
    layers = [name for name, module in model.named_modules() if is_linear(module)]
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in layers if re.fullmatch(pattern, name)}
        if not hits:
            raise ValueError(f"`{pattern}` matches none of the {len(layers)} linear layers")
        found |= hits
    return [name for name in layers if name in found]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies channels by one matrix: a linear layer or a 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


@torch.no_grad()
def _initialise(trainable: Mapping[str, nn.Parameter], adapter: Adapter, seed: int) -> None:
    """A as peft's "gaussian" (deviation 1 / rank) or "kaiming" (uniform, a = sqrt 5); B zero."""
    for name, parameter in trainable.items():
        if parameter.is_meta:
            continue
        if ".lora_B." in name:
            parameter.zero_()
            continue
        shape = tuple(parameter.shape)
        generator = rng.generator(seed, f"lora {name}")
        if adapter.init == "gaussian":
            values = generator.standard_normal(shape) / adapter.rank
        else:
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            values = generator.uniform(-bound, bound, shape)
        parameter.copy_(torch.from_numpy(values))


def export(
    built: Built,
    model: Model,
    family: Family,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `pytorch_lora_weights.safetensors` into `folder`, for `pipeline.load_lora_weights`; or
    the files of `PeftModel.from_pretrained`, where the card says that the pipeline has no loader.

    Rank, alpha and targets stand in the file's metadata (peft's: in `adapter_config.json`), so that
    it loads at the right strength.
    `weights` replace the trained ones; `dtype` is by default what they are trained in.
    """
    import diffusers
    from peft import get_peft_model_state_dict

    values = state(built) if weights is None else weights
    check_names(built, values)
    adapted: Any = built.model
    layers = get_peft_model_state_dict(adapted, state_dict=dict(values), adapter_name=NAME)
    saved = {k: v.to("cpu", dtype or v.dtype).contiguous() for k, v in layers.items()}
    folder.mkdir(parents=True, exist_ok=True)
    said = metadata(adapted.peft_config[NAME])
    if family.card.lora_loader == "peft":
        _write_for_peft(saved, said, folder)
        return
    component = model.trained_component
    arguments: dict[str, Any] = {
        f"{component}_lora_layers": saved,
        f"{component}_lora_adapter_metadata": said,
    }
    getattr(diffusers, family.card.pipeline).save_lora_weights(folder, **arguments)


def file_prefix(family: FamilyCard) -> str:
    """What `export` puts before the names of modules."""
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

    W + (alpha / rank) B A, added up in float32 and rounded once, to `dtype` or that of the base;
    quantised weights are turned back in float32 (nf4 levels and scales, nothing else, are then
    exact), so the sum keeps what the adapter learned of their errors. `weights` replace the trained
    ones.
    """
    values = state(built) if weights is None else weights
    check_names(built, values)
    quantised = dict(quantised_layers(built.model))
    for key, held in built.model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if ".lora_" in key or (owner in quantised and leaf == "scales"):
            continue
        name = owner.removesuffix(".base_layer")
        of, tensor = held.dtype, held
        if owner in quantised and leaf == "codes":
            layer, leaf = quantised[owner], "weight"
            of, plain = layer.form.dtype, layer.weight.shape
            tensor = layer.dequantised(torch.float32).view(plain)
        if leaf == "weight" and f"{name}.lora_A.{NAME}.weight" in values:
            tensor = tensor.float() + _update(built.model, name, values).view_as(tensor)
        yield f"{name}.{leaf}" if name else leaf, tensor.to(dtype or of)


def _update(model: nn.Module, name: str, values: Mapping[str, Tensor]) -> Tensor:
    """(alpha / rank) B A of the layer called `name`, (outputs, inputs), float32."""
    layer: Any = model.get_submodule(name)
    a, b = (values[f"{name}.lora_{which}.{NAME}.weight"].float().flatten(1) for which in "AB")
    update: Tensor = (b @ a) * layer.scaling[NAME]
    return update


def metadata(config: Any) -> dict[str, Any]:
    """peft's configuration as plain values, in an order that is always the same."""
    values: dict[str, Any] = config.to_dict()
    plain = {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in values.items()}
    return {**plain, "lora_dropout": 0.0}  # pipelines load in training mode
