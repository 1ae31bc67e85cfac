"""How many operations a kernel does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.memory import attention

aten = torch.ops.aten


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
    out_val: object = None,
) -> int:
    """For the gradients of input and weight, as many each as the forward pass has: of every element
    one product with each of the weights that it meets. PyTorch's own counter takes a grouped
    convolution's weight for a full one (2.13): of a depthwise one of 1000 channels 500 times too
    many."""
    one = 2 * (x if transposed else gradient).numel() * weight[0].numel()
    return one * (bool(output_mask[0]) + bool(output_mask[1]))


COUNTERS: Mapping[Any, Callable[..., int]] = {
    **attention.COUNTERS,
    aten.convolution_backward: _convolution_backward,
}
