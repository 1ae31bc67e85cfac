"""Norms that are trained beside an adapter, as LyCORIS' `train_norm` has them: what is added to a
layer norm's or group norm's weight and bias. Names in files are LyCORIS'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

NAME = "default"
KINDS = (nn.LayerNorm, nn.GroupNorm)


def norms_of(model: nn.Module) -> list[str]:
    """Names of the norms of `model` that have a weight. Raises ValueError if there is none."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, KINDS) and module.weight is not None
    ]
    if not found:
        raise ValueError("`train_norm`: this model has no layer norm or group norm with a weight")
    return found


def insert_norms(model: nn.Module, names: Sequence[str]) -> None:
    """Put a trained norm in the place of each module called in `names`."""
    for name in names:
        model.set_submodule(name, Norm(model.get_submodule(name)))


class Norm(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """On a layer norm or a group norm."""

    def __init__(self, base_layer: nn.Module) -> None:
        """Zeros: as the base layer alone."""
        super().__init__()
        self.base_layer = base_layer
        layer: Any = base_layer
        self.adapter_layer_names = ("norm_w",) if layer.bias is None else ("norm_w", "norm_b")
        for part in self.adapter_layer_names:
            zeros = torch.zeros_like(layer.weight)
            setattr(self, part, nn.ParameterDict({NAME: nn.Parameter(zeros)}))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def forward(self, input: Tensor) -> Tensor:
        """The norm with its weight and bias moved."""
        layer: Any = self.base_layer
        if self._disable_adapters:
            plain: Tensor = layer(input)
            return plain
        moved: Any = self  # by attributes that mypy takes for modules
        weight = layer.weight + moved.norm_w[NAME]
        bias = None if layer.bias is None else layer.bias + moved.norm_b[NAME]
        if isinstance(layer, nn.LayerNorm):
            return functional.layer_norm(input, layer.normalized_shape, weight, bias, layer.eps)
        return functional.group_norm(input, layer.num_groups, weight, bias, layer.eps)
