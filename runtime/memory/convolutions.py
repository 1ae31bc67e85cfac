"""What a convolution takes on CUDA besides its result, while it runs.

cuDNN's kernels for tensor cores want channels last. Of tensors that lie channels first it makes
copies, in a workspace that comes through PyTorch's allocator: of what is given, of the weight and
of the result. The form follows from the published peaks of a VAE at eighteen sizes, to 0.3 %
(Qwen-Image's in float16, pull request 9305 of InvokeAI), and tells those of two others: of
Flux.1's, of 1, 4 and 8 pictures, to 0.5 %, and of Stable Diffusion 3's
(tests/runtime/test_memory_convolutions.py).

In float32 without TF32 there are no tensor cores; kernels that take channels first are there, and
nothing is counted. Convolutions of each channel by itself are PyTorch's own kernels, which take
none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from runtime.memory.forms import channels_last

aten = torch.ops.aten
FIRST_CORES = {torch.float16: 7.0, torch.bfloat16: 8.0, torch.float32: 8.0}
"""Compute capability from which on there are tensor cores for a type; float32's are TF32."""


def workspaces(capability: float, tf32: bool) -> Mapping[Any, Callable[..., int]]:
    """As `runtime.memory.attention.workspace`, of convolutions on CUDA. A `capability` that is not
    known, 0, is taken for 8.0 or more."""
    on_cores = partial(_on_cores, capability, tf32)
    return {
        aten.convolution.default: partial(_forward, on_cores),
        aten.convolution_backward.default: partial(_backward, on_cores),
    }


def _on_cores(capability: float, tf32: bool, dtype: torch.dtype) -> bool:
    first = FIRST_CORES.get(dtype)
    exact = dtype == torch.float32 and not tf32
    return first is not None and not exact and (not capability or capability >= first)


def _forward(
    on_cores: Callable[[torch.dtype], bool],
    given: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> int:
    if not on_cores(given.dtype) or _by_channel(given, groups):
        return 0
    if channels_last(given) or channels_last(weight):
        return _copied(given, weight)
    numbers = (stride, padding, dilation, output_padding)
    every = [_each(values, given.ndim - 2) for values in numbers]
    sizes = zip(given.shape[2:], weight.shape[2:], *every, strict=True)
    count = given.shape[0] * (weight.shape[1] * groups if transposed else weight.shape[0])
    for size, kernel, step, pad, apart, more in sizes:
        reach = apart * (kernel - 1) + 1
        count *= (
            (size - 1) * step - 2 * pad + reach + more
            if transposed
            else (size + 2 * pad - reach) // step + 1
        )
    return given.nbytes + weight.nbytes + count * given.element_size()


def _backward(
    on_cores: Callable[[torch.dtype], bool],
    grad: Tensor,
    given: Tensor,
    weight: Tensor,
    sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: Sequence[bool],
) -> int:
    """Two kernels, one after the other: for the gradient of what was given, and of the weight.
    Each has the other one and the result's gradient in its workspace, and what it makes."""
    if not on_cores(given.dtype) or _by_channel(given, groups) or not (wanted[0] or wanted[1]):
        return 0
    if channels_last(given) or channels_last(weight):
        return _copied(given, weight, grad)
    return given.nbytes + weight.nbytes + grad.nbytes


def _by_channel(given: Tensor, groups: int) -> bool:
    return groups > 1 and groups == given.shape[1]


def _copied(*tensors: Tensor) -> int:
    """Bytes of the copies that PyTorch makes, where some lie channels last, of those that don't."""
    last = next(filter(None, map(channels_last, tensors)))
    return sum(each.nbytes for each in tensors if not each.is_contiguous(memory_format=last))


def _each(values: Sequence[int], count: int) -> Sequence[int]:
    """One number may stand for all dimensions."""
    return values if len(values) == count else [values[0]] * count
