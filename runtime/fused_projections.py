"""Queries, keys and values by one product in the place of two or three.

Layers that are given the same input are computed together: their weights, one below the other, are
one matrix. Nothing else changes. Each parameter keeps its name, its shape and its optimizer's
state, and is only moved to lie beside the others in memory, so that the matrix needs no copy; the
processors of attention stay what they are, norms and rotations with them. (Diffusers'
`fuse_qkv_projections` puts another layer in their place, which families without a processor of
their own for it ignore, and with which SD3.5's leaves out the norms of queries and keys.)

Layers that carry an adapter are computed together without it: each adds its own to its part.

The first layer of a group that is called computes all of them, and the others find their part. A
layer that is given another input than the first one computes alone, as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

SELF = ("to_q", "to_k", "to_v")
CROSS = ("to_k", "to_v")  # where queries are of another input
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")  # of the second stream


def fuse(model: nn.Module, cross: Iterable[str]) -> int:
    """Compute the projections of each attention of `model` together; returns how many groups.

    `cross` are the last parts of the names of attention modules whose keys and values are of
    another input than their queries. To be called once all weights are where they stay.
    """
    groups = [Group(layers) for layers in sharing_input(model, frozenset(cross))]
    return len(groups)


def sharing_input(model: nn.Module, cross: frozenset[str]) -> Iterator[list[nn.Linear]]:
    """Layers that are given the same input, group by group."""
    for name, module in model.named_modules():
        first = CROSS if name.rpartition(".")[2] in cross else SELF
        for names in (first, ADDED):
            layers = [getattr(module, part, None) for part in names]
            bases = [getattr(layer, "base_layer", layer) for layer in layers]
            found = [layer for layer in bases if type(layer) is nn.Linear]
            biases = {layer.bias is None for layer in found}
            if len(found) == len(names) and len(biases) == 1:
                yield found


class Group:
    """Linear layers of one input, whose `forward` it takes over."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self._layers = layers
        self._given: Tensor | None = None  # what was computed of, until all have their part
        self._parts: dict[int, Tensor] = {}
        self._stock = [layer.forward for layer in layers]
        _move([layer.weight for layer in layers])
        self._biased = layers[0].bias is not None
        if self._biased:
            _move([layer.bias for layer in layers])
        for number, layer in enumerate(layers):
            layer.forward = partial(self._part, number)  # type: ignore[method-assign]

    def _part(self, number: int, given: Tensor) -> Tensor:
        """Output of layer `number`, (..., its rows)."""
        if given is self._given and number in self._parts:
            part = self._parts.pop(number)
        elif number == 0:
            found = self._together(given)
            part, self._given = found[0], given
            self._parts = dict(enumerate(found[1:], 1))
        else:
            part = self._stock[number](given)
        if not self._parts:
            self._given = None
        return part

    def _together(self, given: Tensor) -> tuple[Tensor, ...]:
        weights = [layer.weight for layer in self._layers]
        biases = [layer.bias for layer in self._layers] if self._biased else []
        rows = [weight.shape[0] for weight in weights]
        apply: Any = _Together.apply
        return torch.split(apply(given, len(weights), *weights, *biases), rows, dim=-1)


class _Together(torch.autograd.Function):
    """x W^T + b, with W and b in parts that lie one behind the other in memory."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, count: int, *parts: Tensor) -> Tensor:
        """(..., inputs) -> (..., all rows)."""
        weights, biases = parts[:count], parts[count:]
        ctx.save_for_backward(given, *weights)
        return functional.linear(given, _whole(weights), _whole(biases) if biases else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """dx = dy W; dW = dy^T x and db = the sum of dy over positions, each cut into its parts."""
        given, *weights = ctx.saved_tensors
        rows = [weight.shape[0] for weight in weights]
        of_input, _, *of_parts = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        input_gradient = (flat @ _whole(weights)).view(given.shape) if of_input else None
        found: list[Tensor | None] = [None] * len(of_parts)
        if any(of_parts[: len(rows)]):
            inputs = given.reshape(-1, given.shape[-1])
            found[: len(rows)] = torch.split(flat.t() @ inputs, rows)
        if any(of_parts[len(rows) :]):
            found[len(rows) :] = torch.split(flat.sum(0), rows)
        return input_gradient, None, *found


@torch.no_grad()
def _move(parameters: Sequence[Tensor]) -> None:
    """Let them lie one behind the other in one piece of memory, as they are called."""
    rows = [parameter.shape[0] for parameter in parameters]
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, place in zip(parameters, torch.split(whole, rows), strict=True):
        parameter.data = place


def _whole(parts: Iterable[Tensor]) -> Tensor:
    """The tensor that `parts` are consecutive rows of, without a copy."""
    first, *others = parts
    stop, rows = first.storage_offset() + first.numel(), first.shape[0]
    for part in others:
        there = part.untyped_storage()._cdata == first.untyped_storage()._cdata
        assert there and part.storage_offset() == stop, "somebody has moved a projection's weight"
        stop, rows = stop + part.numel(), rows + part.shape[0]
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
