"""The same LoRA under the names that other programs read, at the same strength."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from attrs import frozen
from torch import Tensor

from runtime.export.mmdit import halves_swapped, place


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


def settings(layers: Layers, component: str, rank: int, alpha: float) -> dict[str, str]:
    """The metadata by which Diffusers knows rank, alpha and targets."""
    config = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(layers)}
    told = {f"{component}.{key}": value for key, value in config.items()}
    return {"lora_adapter_metadata": json.dumps(told, sort_keys=True)}


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
    grouped: dict[str, dict[int, Layer]] = {}
    parts: dict[str, int] = {}
    for module, layer in layers.items():
        there = place(module, blocks)
        b = halves_swapped(layer.b) if there.swapped else layer.b
        kept = Layer(a=layer.a, b=b, scale=layer.scale)
        grouped.setdefault(there.module, {})[there.part] = kept
        parts[there.module] = there.parts
    return {
        f"lora_unet_{module.replace('.', '_')}.{key}": tensor
        for module, found in grouped.items()
        for key, tensor in _stacked(found, parts[module]).items()
    }


def _stacked(found: Mapping[int, Layer], parts: int) -> dict[str, Tensor]:
    present = [found[index] for index in sorted(found)]
    down = torch.cat([layer.a for layer in present])
    up = _diagonal(found, parts)
    alpha = present[0].scale * down.shape[0]
    return {
        "lora_down.weight": down,
        "lora_up.weight": up,
        "alpha": torch.tensor(alpha, dtype=down.dtype),
    }


def _diagonal(found: Mapping[int, Layer], parts: int) -> Tensor:
    """(parts * outputs, sum of ranks): each B in its own rows and columns, zeros elsewhere."""
    layers: Sequence[Layer] = [found[index] for index in sorted(found)]
    outputs = layers[0].b.shape[0]
    up = layers[0].b.new_zeros(parts * outputs, sum(layer.b.shape[1] for layer in layers))
    column = 0
    for index in sorted(found):
        b = found[index].b
        up[index * outputs : (index + 1) * outputs, column : column + b.shape[1]] = b
        column += b.shape[1]
    return up
