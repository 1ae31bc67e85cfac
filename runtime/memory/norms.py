"""RMS norm on meta tensors, as CUDA runs it: one kernel that keeps its input and a number a row.

PyTorch has had that kernel since 2.9 (`_fused_rms_norm`); for meta tensors it has only what the
kernel stands for, which makes and keeps copies in float32. Diffusers' Flux and Flux.2 call it
(`torch.nn.RMSNorm`); the other families' norms are written out, and are what they are everywhere.
Where the packages for it are installed, PyTorch 2.13 takes another kernel on compute capabilities
9.0 and 10.0 (torch/_native/ops/norm), which keeps the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

Norm = Callable[..., Tensor]

# LaunchGammaBetaBackwardCUDAKernel in layer_norm_kernel.cu: of many short rows, the weight's
# gradient is first summed over 32 rows at a time, in so many blocks at most.
MANY_ROWS = 64 * 1024
BLOCK = 32  # rows, and columns
BLOCKS = 32 * 1024
MULTIPROCESSORS = 188  # of the largest device (RTX PRO 6000): a row is short for more rows there


def norm_for(stock: Norm) -> Norm:
    """`torch.nn.functional.rms_norm` as CUDA runs it; `stock`: PyTorch's."""

    def rms_norm(
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        """(*, *normalized_shape) -> the same."""
        if input.is_meta and fused(input, weight):
            out: Tensor = _Fused.apply(input, math.prod(normalized_shape), weight)  # type: ignore[no-untyped-call]
            return out
        return stock(input, normalized_shape, weight, eps)

    return rms_norm


def fused(input: Tensor, weight: Tensor | None) -> bool:
    """Whether CUDA has one kernel for it (rms_norm_symint in layer_norm.cpp)."""
    return (
        suggest_memory_format(input) == torch.contiguous_format
        and not input.is_complex()
        and (weight is None or weight.dtype == input.dtype)
    )


class _Fused(torch.autograd.Function):
    """`_fused_rms_norm`, by its allocations: `_fused_rms_norm_cuda` and
    `_fused_rms_norm_backward_cuda` in layer_norm_kernel.cu; what is saved: derivatives.yaml."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, columns: int, weight: Tensor | None) -> Tensor:
        """The result lies row by row, whatever the input does."""
        rows = input.contiguous()  # a copy where it lies otherwise, for as long as the kernel runs
        out = torch.empty_like(rows)
        exact = torch.float64 if input.dtype == torch.float64 else torch.float32
        scale = torch.empty(input.numel() // columns, dtype=exact, device=input.device)
        ctx.save_for_backward(input, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """Gradients of input and weight, as far as they are wanted."""
        input, weight, scale = ctx.saved_tensors
        wants_input, _, wants_weight = ctx.needs_input_grad
        rows = input.contiguous()
        of_input = torch.empty_like(rows) if wants_input else None
        of_weight = torch.empty_like(weight) if wants_weight else None
        given = grads[0].contiguous()
        if of_weight is not None:
            parts = partial_sums(scale.numel(), weight.numel())
            if parts:
                sums = given.new_empty(parts, weight.numel())
                of_weight = sums.sum(0).view_as(weight)
        return of_input, None, of_weight


def partial_sums(rows: int, columns: int) -> int:
    """How many rows the sums have that the weight's gradient is the sum of; 0: there are none."""
    if rows <= MANY_ROWS or columns // BLOCK >= MULTIPROCESSORS // 2:
        return 0
    return min(BLOCKS // -(-columns // BLOCK), -(-rows // BLOCK))
