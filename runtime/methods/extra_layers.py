"""Layers of adapters that peft has not, or not on every layer: GLoRA, (IA)^3 and whole matrices.

Each keeps its layer as `base_layer` and calls it, so that quantised weights carry them as well.
Names and shapes of the weights are those of the programs that read the files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from compiler.adapters import AdapterKind, rank_of, scale_of
from compiler.plan import Adapter

NAME = "default"


class Extra(nn.Module, BaseTunerLayer, ABC):  # type: ignore[misc]
    """What they have in common: a base layer, and weights by part."""

    def __init__(self, base_layer: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Weights of `shapes` by part, zeros, of the base weight's number format and device."""
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names = tuple(shapes)
        self.is_convolution = isinstance(base_layer, nn.Conv2d)
        form: Any = base_layer.weight
        for part, shape in shapes.items():
            zeros = torch.zeros(shape, dtype=form.dtype, device=form.device)
            setattr(self, part, nn.ParameterDict({NAME: nn.Parameter(zeros)}))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def part(self, name: str) -> Tensor:
        """The weight called `name`."""
        held: Tensor = getattr(self, name)[NAME]
        return held

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's product, adapted."""
        if self._disable_adapters:
            plain: Tensor = self.base_layer(input)
            return plain
        return self.adapted(input)

    @abstractmethod
    def adapted(self, input: Tensor) -> Tensor:
        """See `forward`. `input` is what the base layer takes."""


def edges(layer: Any) -> tuple[int, int]:
    """A linear layer's or convolution's outputs and inputs."""
    if isinstance(layer, nn.Conv2d):
        return int(layer.out_channels), int(layer.in_channels)
    return int(layer.out_features), int(layer.in_features)


class Glora(Extra):
    """Generalised LoRA as LyCORIS has it: W + s (W A1 A2 + B1 B2), on a linear layer or a 1x1
    convolution."""

    def __init__(self, base_layer: nn.Module, adapter: Adapter, module: str) -> None:
        """A2 and B2 zero: as the base layer alone."""
        outputs, inputs = edges(base_layer)
        rank = rank_of(adapter, module)
        pixels = (1, 1) if isinstance(base_layer, nn.Conv2d) else ()
        shapes = {
            "glora_a1": (inputs, rank, *pixels),
            "glora_a2": (rank, inputs, *pixels),
            "glora_b1": (outputs, rank, *pixels),
            "glora_b2": (rank, inputs, *pixels),
        }
        super().__init__(base_layer, shapes)
        self.scale = scale_of(adapter, module)

    def adapted(self, input: Tensor) -> Tensor:
        """W (x + s A1 A2 x) + s B1 B2 x."""
        x = input.movedim(1, -1) if self.is_convolution else input
        inner = functional.linear(self._by("a2", x), self._matrix("a1"))
        outer = functional.linear(self._by("b2", x), self._matrix("b1"))
        moved = x + self.scale * inner
        if not self.is_convolution:
            product: Tensor = self.base_layer(moved)
            return product + self.scale * outer
        product = self.base_layer(moved.movedim(-1, 1))
        return product + self.scale * outer.movedim(-1, 1)

    def _matrix(self, name: str) -> Tensor:
        return self.part(f"glora_{name}").flatten(1)

    def _by(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self._matrix(name))


class Ia3(Extra):
    """(IA)^3: each output times a number, the bias's share included, as peft has it."""

    def __init__(self, base_layer: nn.Module, adapter: Adapter, module: str) -> None:
        """Ones, once they are set: as the base layer alone."""
        outputs, _ = edges(base_layer)
        flat = not isinstance(base_layer, nn.Conv2d)
        super().__init__(base_layer, {"ia3_l": (outputs, 1) if flat else (1, outputs, 1, 1)})

    def adapted(self, input: Tensor) -> Tensor:
        """l (W x + b)."""
        product: Tensor = self.base_layer(input)
        lengths = self.part("ia3_l")
        return product * (lengths if self.is_convolution else lengths.flatten())


class Full(Extra):
    """A whole matrix that is added to the weight."""

    def __init__(self, base_layer: nn.Module, adapter: Adapter, module: str) -> None:
        """Zeros: as the base layer alone."""
        outputs, inputs = edges(base_layer)
        kernel = base_layer.kernel_size if isinstance(base_layer, nn.Conv2d) else ()
        super().__init__(base_layer, {"full_diff": (outputs, inputs, *kernel)})

    def adapted(self, input: Tensor) -> Tensor:
        """W x + b + D x."""
        product: Tensor = self.base_layer(input)
        return product + self._update(input)

    def _update(self, input: Tensor) -> Tensor:
        layer, matrix = self.base_layer, self.part("full_diff")
        if not isinstance(layer, nn.Conv2d):
            return functional.linear(input, matrix)
        stride, padding, dilation = layer.stride, layer.padding, layer.dilation
        return functional.conv2d(input, matrix, None, stride, padding, dilation)


LAYERS: Mapping[AdapterKind, Callable[[nn.Module, Adapter, str], Extra]] = {
    "glora": Glora,
    "ia3": Ia3,
    "full": Full,
}


def insert_extra(model: nn.Module, adapter: Adapter, targets: Sequence[str]) -> None:
    """Put a layer of the adapter's kind in the place of each module called in `targets`; only
    adapters then require gradients."""
    for name in targets:
        layer = LAYERS[adapter.kind](model.get_submodule(name), adapter, name)
        model.set_submodule(name, layer)
