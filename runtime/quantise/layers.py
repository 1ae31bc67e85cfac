"""Layers that hold quantised weights and multiply by them.

They are linear layers and 1x1 convolutions by type, so that adapters find them. A weight is turned
back for each product and dropped at once; the backward pass does so again, keeping no copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from compiler.plan import Quantisation
from runtime.quantise import codes as coding

_unread: dict[Any, Tensor] | None = None  # by device, type and shape: what `unread` has shown


@contextmanager
def unread() -> Iterator[None]:
    """Inside, `weight` has the layer's device, type and shape, but no values: who only asks where
    and what it is does not have it turned back, once for every question."""
    global _unread
    before, _unread = _unread, {}
    try:
        yield
    finally:
        _unread = before


class Quantised(nn.Module):
    """What both layers share. `form` is an empty buffer that has the layer's device and type."""

    kind: Quantisation
    shape: tuple[int, int]  # output and input channels
    bias: Any  # a parameter or None
    codes: nn.Parameter
    scales: nn.Parameter
    form: Tensor
    levels: Tensor | None

    @classmethod
    def like(cls, layer: nn.Module, kind: Quantisation, device: torch.device) -> Quantised:
        """A layer of the form of `layer`, with its bias; codes on `device`, not yet set."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        settings = {key: value for key, value in vars(layer).items() if not key.startswith("_")}
        made.__dict__.update(settings)
        made.kind, made.shape = kind, (weight.shape[0], weight.shape[1])
        bias = layer.bias
        made.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
        made._hold(*coding.empty(kind, *made.shape, device), weight.dtype)
        return made

    def take(self, weight: Tensor, device: torch.device) -> None:
        """Quantise `weight` where it is, and hold the result on `device`."""
        codes, scales = coding.quantised(weight.reshape(self.shape), self.kind)
        self._hold(codes.to(device), scales.to(device), weight.dtype)

    def _hold(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        device = codes.device
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_buffer("form", torch.empty(0, dtype=dtype, device=device), persistent=False)
        levels = coding.nf4_levels(device) if self.kind == "nf4" else None
        self.register_buffer("levels", levels, persistent=False)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight, (output channels, input channels)."""
        if _unread is not None:
            form = (self.codes.device, dtype, self.shape)
            if form not in _unread:
                _unread[form] = self.codes.new_empty(1, dtype=dtype).expand(self.shape)
            return _unread[form]
        return coding.dequantised(
            self.codes, self.scales, self.kind, self.shape, dtype, self.levels
        )

    @property
    def weight(self) -> Tensor:
        """The weight in the form of the plain layer: a new tensor, changing it changes nothing."""
        return self.dequantised(self.form.dtype)

    def extra_repr(self) -> str:
        """The plain layer's, and the kind."""
        return f"{super().extra_repr()}, {self.kind}"


class QuantisedLinear(Quantised, nn.Linear):  # type: ignore[override]
    """x W^T + b, (..., input channels) -> (..., output channels)."""

    def forward(self, input: Tensor) -> Tensor:
        """The product, computed in the type of `input`."""
        product: Tensor = _Linear.apply(input, self)  # type: ignore[no-untyped-call]
        return product


class QuantisedConv2d(Quantised, nn.Conv2d):
    """A 1x1 convolution, (B, input channels, H, W) -> (B, output channels, H, W)."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """With arguments, a plain convolution: peft makes its own layers by the base's type."""
        return nn.Conv2d(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """See `Quantised.weight`; (output channels, input channels, 1, 1)."""
        return self.dequantised(self.form.dtype)[:, :, None, None]

    def forward(self, input: Tensor) -> Tensor:
        """The product, computed in the type of `input`."""
        product: Tensor = _Pointwise.apply(input, self)  # type: ignore[no-untyped-call]
        return product


class _Linear(torch.autograd.Function):
    """The layer itself is kept for the backward pass, not its tensors: they may have moved."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Quantised) -> Tensor:
        ctx.layer = layer
        return F.linear(input, layer.dequantised(input.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantised(gradient.dtype), None


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Quantised) -> Tensor:
        ctx.layer, ctx.shape = layer, input.shape
        weight = layer.dequantised(input.dtype)[:, :, None, None]
        return F.conv2d(input, weight, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.dequantised(gradient.dtype)[:, :, None, None]
        of_input: Tensor = conv2d_input(ctx.shape, weight, gradient)  # type: ignore[no-untyped-call]
        return of_input, None


def eligible(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` to quantise: matrices inside its blocks, by name.

    Blocks are what module lists hold. Outside of them are the layers that take in patches, times
    and prompts and the one that gives the result, whose errors nothing later makes up for.
    """
    lists = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    )
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(lists) and _is_matrix(module)
    }


def _is_matrix(module: nn.Module) -> bool:
    if isinstance(module, Quantised):
        return False
    if isinstance(module, nn.Conv2d):
        one = (1, 1)
        plain = module.stride == module.dilation == one and not any(module.padding)
        return module.kernel_size == one and module.groups == 1 and plain
    return isinstance(module, nn.Linear)


def hollow(model: nn.Module, kind: Quantisation, device: torch.device) -> None:
    """Make the eligible layers of `model` quantised ones on `device`, their codes not yet set."""
    for name, layer in eligible(model).items():
        model.set_submodule(name, _form_of(layer).like(layer, kind, device))


@torch.no_grad()
def quantise(
    model: nn.Module, kind: Quantisation, device: torch.device, *, on: torch.device
) -> None:
    """Quantise the eligible layers of `model`, each on `on`, one after the other, to `device`.

    Each plain weight is dropped before the next one is looked at.
    """
    for name, layer in eligible(model).items():
        made = _form_of(layer).like(layer, kind, device)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        made.take(weight.to(on), device)
        model.set_submodule(name, made)


def most_beside(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes at most, beside the layers that are there, while `model` is quantised where they are:
    the largest plain weight in `dtype`, and what its codes are made of."""
    sizes = [layer.shape[0] * layer.shape[1] for _, layer in quantised_layers(model)]
    largest = max(sizes, default=0)
    return largest * dtype.itemsize + min(largest, coding.PIECE) * coding.WORKING


def plain(layer: Quantised) -> nn.Module:
    """The plain layer with the weight that `layer` stands for."""
    outputs, inputs = layer.shape
    made: nn.Module
    if isinstance(layer, nn.Conv2d):
        made = nn.Conv2d(inputs, outputs, 1, device="meta")
    else:
        made = nn.Linear(inputs, outputs, device="meta")
    made.weight = nn.Parameter(layer.weight, requires_grad=False)
    made.register_parameter("bias", layer.bias)
    return made


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, Quantised]]:
    """The quantised layers of `model` by name."""
    for name, module in model.named_modules():
        if isinstance(module, Quantised):
            yield name, module


def num_weights(model: nn.Module) -> int:
    """How many weights `model` has, quantised ones counted as what they stand for."""
    layers = [layer for _, layer in quantised_layers(model)]
    packed = sum(layer.codes.numel() + layer.scales.numel() for layer in layers)
    held = sum(parameter.numel() for parameter in model.parameters())
    return held - packed + sum(layer.shape[0] * layer.shape[1] for layer in layers)


def _form_of(layer: nn.Module) -> type[Quantised]:
    return QuantisedConv2d if isinstance(layer, nn.Conv2d) else QuantisedLinear
