"""The same LoRA under the names that other programs read, at the same strength."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from attrs import frozen
from torch import Tensor

from runtime.export import bfl, bfl2, mmdit, nextdit
from runtime.export.mmdit import Place, halves_swapped
from runtime.export.sgm import published
from runtime.methods.adapter_files import lora_sizes, settings_of

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
    return prefixed(bare(layers), component)


def bare(layers: Layers) -> dict[str, Tensor]:
    """The same without the component's name, as peft has it below a root of its own."""
    return {
        f"{module}.lora_{which}.weight": tensor
        for module, layer in layers.items()
        for which, tensor in (("A", layer.a), ("B", layer.b))
    }


def settings(layers: Layers, component: str) -> dict[str, str]:
    """The metadata by which Diffusers knows ranks, alphas and targets."""
    return told(_sizes(layers), component)


def of_peft(layers: Layers) -> dict[str, Any]:
    """peft's settings of a LoRA, for the file beside its tensors."""
    import peft

    return settings_of(peft.LoraConfig(**_sizes(layers)))


def _sizes(layers: Layers) -> dict[str, Any]:
    ranks = {module: layer.a.shape[0] for module, layer in layers.items()}
    alphas = {module: layer.scale * ranks[module] for module, layer in layers.items()}
    return {**lora_sizes(ranks, alphas), "target_modules": sorted(layers)}


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


def kohya_flux2(layers: Layers, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """musubi-tuner's keys for Flux.2 (networks/lora_flux_2.py), laid out as `kohya_sd3` says.
    Raises KeyError for a module that the layout does not have."""
    return _fused(layers, bfl2.place)


def kohya_lumina2(layers: Layers, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """sd-scripts' keys for Lumina-Image 2.0 (networks/lora_lumina.py), laid out as `kohya_sd3`
    says. Raises KeyError for a module that the layout does not have."""
    return _fused(layers, partial(nextdit.place, config=config))


def generic_flux2(layers: Layers, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """`generic` under the names of Flux.2 as published. Raises KeyError."""
    return _generic(layers, bfl2.place)


def generic_lumina2(layers: Layers, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """`generic` under the names of Lumina-Image 2.0 as published. Raises KeyError."""
    return _generic(layers, partial(nextdit.place, config=config))


def _generic(layers: Layers, place: Callable[[str], Place]) -> dict[str, Tensor]:
    """ComfyUI's keys for any model (comfy/lora.py): `diffusion_model.` and the published names,
    peft's names of the two matrices, and the strength in the second."""
    return {
        f"diffusion_model.{module}.{key}": tensor
        for module, (found, rows) in _grouped(layers, place).items()
        for key, tensor in _halves(found, rows).items()
    }


def _halves(found: Mapping[int, Layer], rows: Sequence[int]) -> dict[str, Tensor]:
    stacked = _stacked(found, rows)
    down, up = stacked["lora_down.weight"], stacked["lora_up.weight"]
    scaled = (up.float() * (stacked["alpha"].item() / down.shape[0])).to(up.dtype)
    return {"lora_A.weight": down, "lora_B.weight": scaled}


def _fused(layers: Layers, place: Callable[[str], Place]) -> dict[str, Tensor]:
    return {
        f"lora_unet_{module.replace('.', '_')}.{key}": tensor
        for module, (found, rows) in _grouped(layers, place).items()
        for key, tensor in _stacked(found, rows).items()
    }


Grouped = dict[str, tuple[dict[int, Layer], Sequence[int]]]


def _grouped(layers: Layers, place: Callable[[str], Place]) -> Grouped:
    """By the layer that they share there, the parts and the rows of each."""
    grouped: dict[str, dict[int, Layer]] = {}
    rows: dict[str, Sequence[int]] = {}
    for module, layer in layers.items():
        there = place(module)
        b = halves_swapped(layer.b) if there.swapped else layer.b
        kept = Layer(a=layer.a, b=b, scale=layer.scale)
        grouped.setdefault(there.module, {})[there.part] = kept
        rows[there.module] = there.rows or [b.shape[0]] * there.parts
    return {module: (found, rows[module]) for module, found in grouped.items()}


def kohya_own(layers: Layers, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keys with Diffusers' own names: sd-scripts' for Stable Diffusion 1 and 2 (networks/lora.py),
    musubi-tuner's for Qwen-Image and Z-Image (networks/lora_qwen_image.py, lora_zimage.py)."""
    return _kohya(layers, lambda module: module)


def kohya_kolors(layers: Layers, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """`kohya_own`, but for `add_embedding`, which Diffusers reads by its name in the UNet that was
    published, as ComfyUI does too. Raises KeyError for `encoder_hid_proj`, which has none."""
    return _kohya(layers, partial(_of_kolors, config=config))


def _of_kolors(module: str, config: Mapping[str, Any]) -> str:
    outside = module.startswith(("add_embedding.", "encoder_hid_proj"))
    return published(module, config) if outside else module


def kohya_sgm(layers: Layers, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """sd-scripts' keys for Stable Diffusion XL (networks/lora.py, library/sdxl_original_unet.py):
    the names of the UNet that was published. Raises KeyError for a module that it does not have."""
    return _kohya(layers, partial(published, config=config))


def kohya_plain(layers: Layers, root: str) -> dict[str, Tensor]:
    """sd-scripts' keys for layers that keep their names, below `root`."""
    return _kohya(layers, lambda module: module, root)


def _kohya(
    layers: Layers, name: Callable[[str], str], root: str = "lora_unet"
) -> dict[str, Tensor]:
    return {
        f"{root}_{name(module).replace('.', '_')}.{key}": tensor
        for module, layer in _of_one_alpha(layers).items()
        for key, tensor in _stacked({0: layer}).items()
    }


def _of_one_alpha(layers: Layers) -> Layers:
    """The same updates with one alpha for all: where a UNet's differ, Diffusers takes the first
    one's for every attention. B takes up the rest."""
    alphas = [layer.scale * layer.a.shape[0] for layer in layers.values()]
    if len(set(alphas)) < 2:
        return layers
    return {module: _with_alpha(layer, max(alphas)) for module, layer in layers.items()}


def _of_one_scale(found: Mapping[int, Layer]) -> Mapping[int, Layer]:
    scale = max(layer.scale for layer in found.values())
    return {index: _with_scale(layer, scale) for index, layer in found.items()}


def _with_alpha(layer: Layer, alpha: float) -> Layer:
    return _with_scale(layer, alpha / layer.a.shape[0])


def _with_scale(layer: Layer, scale: float) -> Layer:
    """The same update at another scale; as it is, bit for bit, where that is its own."""
    if layer.scale == scale:
        return layer
    b = (layer.b.float() * (layer.scale / scale)).to(layer.b.dtype)
    return Layer(a=layer.a, b=b, scale=scale)


def _stacked(found: Mapping[int, Layer], rows: Sequence[int] = ()) -> dict[str, Tensor]:
    """Of the layers that share one, by their place in it; `rows` are those of each place. They
    share alpha / rank too: where theirs differ, B takes up the rest."""
    found = _of_one_scale(found)
    present = [found[index] for index in sorted(found)]
    down = torch.cat([layer.a for layer in present])
    up = _diagonal(found, rows) if len(rows) > 1 else present[0].b
    alpha = present[0].scale * down.shape[0]
    return {
        "lora_down.weight": down,
        "lora_up.weight": up,
        "alpha": torch.tensor(alpha, dtype=torch.float32),  # bfloat16 has no digits for it
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
