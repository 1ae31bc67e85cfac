"""The same LoRA under the names that other programs read, at the same strength."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from attrs import frozen
from torch import Tensor

from runtime.export import bfl, mmdit
from runtime.export.mmdit import Place, halves_swapped
from runtime.export.sgm import published
from runtime.methods.adapter_files import lora_sizes

T = TypeVar("T")


@frozen(kw_only=True)
class Layer:
    """The adapter of one module: W + scale B A, in Diffusers' own rows."""

    a: Tensor  # (rank, inputs) or (rank, inputs, 1, 1)
    b: Tensor  # (outputs, rank) or (outputs, rank, 1, 1)
    scale: float  # alpha / rank

    def update(self) -> Tensor:
        """What is added to the weight, (outputs, inputs), float32."""
        return self.b.float().flatten(1) @ self.a.float().flatten(1) * self.scale


Layers = Mapping[str, Layer]  # by module name


def diffusers(layers: Layers, component: str) -> dict[str, Tensor]:
    """As `load_lora_weights` takes them; the strength stands in the metadata, see `settings`."""
    return {
        f"{component}.{module}.lora_{which}.weight": tensor
        for module, layer in layers.items()
        for which, tensor in (("A", layer.a), ("B", layer.b))
    }


def settings(layers: Layers, component: str) -> dict[str, str]:
    """The metadata by which Diffusers knows ranks, alphas and targets."""
    ranks = {module: layer.a.shape[0] for module, layer in layers.items()}
    alphas = {module: layer.scale * ranks[module] for module, layer in layers.items()}
    sizes = lora_sizes(ranks, alphas)
    return told({**sizes, "target_modules": sorted(layers)}, component)


def told(config: Mapping[str, Any], component: str) -> dict[str, str]:
    """peft's settings as an entry of a file's metadata."""
    named = {f"{component}.{key}": value for key, value in config.items()}
    return {"lora_adapter_metadata": json.dumps(named, sort_keys=True)}


def prefixed(tensors: Mapping[str, T], root: str) -> dict[str, T]:
    """The same under longer names."""
    return {f"{root}.{name}": tensor for name, tensor in tensors.items()}


def folded(layers: Layers, component: str) -> dict[str, Tensor]:
    """The same names with the strength in B, for programs that don't read that metadata."""
    scaled = {
        module: Layer(a=layer.a, b=(layer.b.float() * layer.scale).to(layer.b.dtype), scale=1.0)
        for module, layer in layers.items()
    }
    return diffusers(scaled, component)


def kohya_sd3(layers: Layers, blocks: int) -> dict[str, Tensor]:
    """sd-scripts' keys for Stable Diffusion 3 (networks/lora_sd3.py).

    Query, key and value share one layer: the matrices A lie one upon the other, the matrices B on
    a diagonal, which gives the same update with the sum of the ranks. Alpha grows with the rank, so
    that alpha / rank stays. Raises KeyError for a module that the layout does not have.
    """
    return _fused(layers, partial(mmdit.place, blocks=blocks))


def kohya_flux(layers: Layers, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """sd-scripts' keys for Flux.1 (networks/lora_flux.py), laid out as `kohya_sd3` says. Raises
    KeyError for a module that the layout does not have."""
    return _fused(layers, partial(bfl.place, config=config))


def _fused(layers: Layers, place: Callable[[str], Place]) -> dict[str, Tensor]:
    grouped: dict[str, dict[int, Layer]] = {}
    rows: dict[str, Sequence[int]] = {}
    for module, layer in layers.items():
        there = place(module)
        b = halves_swapped(layer.b) if there.swapped else layer.b
        kept = Layer(a=layer.a, b=b, scale=layer.scale)
        grouped.setdefault(there.module, {})[there.part] = kept
        rows[there.module] = there.rows or [b.shape[0]] * there.parts
    return {
        f"lora_unet_{module.replace('.', '_')}.{key}": tensor
        for module, found in grouped.items()
        for key, tensor in _stacked(found, rows[module]).items()
    }


def kohya_unet(layers: Layers, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """sd-scripts' keys for Stable Diffusion 1 and 2 (networks/lora.py): Diffusers' own names."""
    return _kohya(layers, lambda module: module)


def kohya_sgm(layers: Layers, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """sd-scripts' keys for Stable Diffusion XL (networks/lora.py, library/sdxl_original_unet.py):
    the names of the UNet that was published. Raises KeyError for a module that it does not have."""
    return _kohya(layers, partial(published, config=config))


def _kohya(layers: Layers, name: Callable[[str], str]) -> dict[str, Tensor]:
    return {
        f"lora_unet_{name(module).replace('.', '_')}.{key}": tensor
        for module, layer in layers.items()
        for key, tensor in _stacked({0: layer}).items()
    }


def _stacked(found: Mapping[int, Layer], rows: Sequence[int] = ()) -> dict[str, Tensor]:
    """Of the layers that share one, by their place in it; `rows` are those of each place."""
    present = [found[index] for index in sorted(found)]
    down = torch.cat([layer.a for layer in present])
    up = _diagonal(found, rows) if len(rows) > 1 else present[0].b
    alpha = present[0].scale * down.shape[0]
    return {
        "lora_down.weight": down,
        "lora_up.weight": up,
        "alpha": torch.tensor(alpha, dtype=down.dtype),
    }


def _diagonal(found: Mapping[int, Layer], rows: Sequence[int]) -> Tensor:
    """(sum of `rows`, sum of ranks): each B in its own rows and columns, zeros elsewhere."""
    layers: Sequence[Layer] = [found[index] for index in sorted(found)]
    up = layers[0].b.new_zeros(sum(rows), sum(layer.b.shape[1] for layer in layers))
    column = 0
    for index in sorted(found):
        b, first = found[index].b, sum(rows[:index])
        up[first : first + rows[index], column : column + b.shape[1]] = b
        column += b.shape[1]
    return up
