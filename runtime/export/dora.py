"""DoRA under other programs' keys: those of a LoRA, and `dora_scale`, a number for each row.

sd-scripts' readers (LyCORIS, modules/locon.py) take W + s B A and give each row the length that
`dora_scale` says, as the paper does. ComfyUI (comfy/weight_adapter/base.py) multiplies the rows by
`dora_scale` over the lengths of W's own rows; so there the number is m |W| / |W + s B A|, which
gives the same weight at strength 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from runtime.export.lazy import Lazy, Tensors
from runtime.export.lora_keys import Layer

Write = Callable[[Mapping[str, Layer]], dict[str, Tensor]]
"""From one layer by its module to its tensors under the format's keys."""
ENDS = (".lora_down.weight", ".lora_A.weight")


def with_lengths(
    layers: Mapping[str, Layer], lengths: Mapping[str, Tensor], write: Write
) -> dict[str, Tensor]:
    """Each layer by `write`, and `dora_scale` beside it."""
    found: dict[str, Tensor] = {}
    for module, layer in layers.items():
        tensors = write({module: layer})
        down = next(key for key in tensors if key.endswith(ENDS))
        prefix = next(down.removesuffix(end) for end in ENDS if down.endswith(end))
        ones = [1] * (layer.a.ndim - 1)
        found |= tensors | {f"{prefix}.dora_scale": lengths[module].reshape(-1, *ones)}
    return found


def of_the_base(
    updates: Mapping[str, Tensor], lengths: Mapping[str, Tensor], base: Tensors
) -> dict[str, Tensor]:
    """The lengths m |W| / |W + D| by which ComfyUI gives the rows the lengths m; `updates` are D by
    module, (outputs, inputs) float32 each."""
    return {
        module: _rescaled(base[f"{module}.weight"], update, lengths[module])
        for module, update in updates.items()
    }


def _rescaled(weight: Lazy, update: Tensor, lengths: Tensor) -> Tensor:
    before = weight.read().float().flatten(1)
    after = before + update
    share = torch.linalg.vector_norm(before, dim=1) / torch.linalg.vector_norm(after, dim=1)
    found: Tensor = (lengths.float().flatten() * share).to(lengths.dtype).view(lengths.shape)
    return found
