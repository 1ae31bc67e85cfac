"""LoKr and LoHa with the lengths of the weight's rows learned apart, as LyCORIS has them.

DoRA (Liu et al., 2024, arXiv 2402.09353) on another update than B A: the weight becomes m V / |V|
with V = W + D. As there (section 4.3), no gradient goes through |V|. peft's layers make D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.loha.layer import Conv2d as LohaConv2d
from peft.tuners.loha.layer import Linear as LohaLinear
from peft.tuners.lokr.layer import Conv2d as LokrConv2d
from peft.tuners.lokr.layer import Linear as LokrLinear
from torch import Tensor, nn
from torch.nn import functional

NAME = "default"
PART = "dora_scale"  # as files call the lengths


class _Decomposed:
    """Mixed into a layer of peft's, which it takes the weights and chances from."""

    base_layer: nn.Module
    training: bool

    def begin(self: Any) -> None:
        """Put the lengths of the base's rows there, (outputs, 1) or (outputs, 1, 1, 1)."""
        with torch.no_grad():
            weight: Tensor = self.base_layer.weight
            lengths = self.lengths(weight).to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))
        setattr(self, PART, nn.ParameterDict({NAME: nn.Parameter(lengths)}))

    @staticmethod
    def lengths(weight: Tensor) -> Tensor:
        """Of the rows of a weight, (outputs,); float32 at least."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        found: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=wide)
        return found

    def forward(self: Any, input: Tensor) -> Tensor:
        """(m / |V|) V x + b, (..., outputs) or (B, outputs, H, W)."""
        if self._disable_adapters or self.merged:
            plain: Tensor = super().forward(input)  # type: ignore[misc]
            return plain
        left_out = self.module_dropout[NAME]
        if self.training and left_out and torch.rand(1) <= left_out:
            left: Tensor = self.base_layer(input)
            return left
        layer = self.base_layer
        dropped = self.training and bool(self.rank_dropout[NAME])
        update = self.get_delta_weight(NAME, apply_rank_dropout=dropped)
        with torch.no_grad():
            lengths = self.lengths(layer.weight + update.to(layer.weight.dtype))
        factor = (getattr(self, PART)[NAME].flatten() / lengths).to(input.dtype)
        product = layer(input)
        bias = layer.bias
        if isinstance(layer, nn.Conv2d):
            product = product + self._convolved(input, update.to(input.dtype))
            factor = factor.view(-1, 1, 1)
            bias = None if bias is None else bias.view(-1, 1, 1)
        else:
            product = product + functional.linear(input, update.to(input.dtype))
        found: Tensor = product * factor if bias is None else (product - bias) * factor + bias
        return found

    def _convolved(self: Any, input: Tensor, update: Tensor) -> Tensor:
        layer = self.base_layer
        return functional.conv2d(
            input, update, None, layer.stride, layer.padding, layer.dilation, layer.groups
        )


class _LokrLinear(_Decomposed, LokrLinear):  # type: ignore[misc]
    adapter_layer_names = (*LokrLinear.adapter_layer_names, PART)


class _LokrConv2d(_Decomposed, LokrConv2d):  # type: ignore[misc]
    adapter_layer_names = (*LokrConv2d.adapter_layer_names, PART)


class _LohaLinear(_Decomposed, LohaLinear):  # type: ignore[misc]
    adapter_layer_names = (*LohaLinear.adapter_layer_names, PART)


class _LohaConv2d(_Decomposed, LohaConv2d):  # type: ignore[misc]
    adapter_layer_names = (*LohaConv2d.adapter_layer_names, PART)


OF: dict[type, type[_Decomposed]] = {
    LokrLinear: _LokrLinear,
    LokrConv2d: _LokrConv2d,
    LohaLinear: _LohaLinear,
    LohaConv2d: _LohaConv2d,
}


def decompose(model: nn.Module, targets: Sequence[str]) -> None:
    """Give peft's layers at `targets` lengths of their own."""
    for name in targets:
        layer: Any = model.get_submodule(name)
        layer.__class__ = OF[type(layer)]
        layer.begin()
