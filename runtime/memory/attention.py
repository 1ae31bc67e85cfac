"""Attention on meta tensors, by the kernel that the target device would take.

`scaled_dot_product_attention` chooses its kernel by the tensors' device and knows none for meta
tensors, where it multiplies out the whole matrix of scores. Here the choice is made for the target
device, and the kernel's own operation is called: its derivative then saves what it saves there
(query, key, value, output, log-sum-exp). What kernels allocate inside is `workspace`, a term of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

Kernel = Literal["flash", "efficient", "math"]
Like = Literal["device", "flash", "efficient", "math"]
Attention = Callable[..., Tensor]

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)
ALIGNMENT = 8  # elements to which CUDA kernels pad head sizes and masks (sdp_utils, attention.cpp)
FLASH_HEAD = 256  # largest head size of the CUDA flash kernel
FLASH_ROWS = 128  # rows to which its backward pass pads its buffers
EFFICIENT_ROWS = 64  # and the memory-efficient kernel's

# PyTorch counts the CUDA kernels' operations; the CPU's has the same arguments.
COUNTERS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


def attention_for(device: str, stock: Attention, like: Like = "device") -> Attention:
    """`scaled_dot_product_attention` as `device` ("cpu", "cuda", ...) runs it; `stock`: PyTorch's.

    `like` is the kernel that was asked for, "device" for the device's own choice. The devices
    without a rule here (mps, xpu) are taken to have CUDA's kernels.
    """
    run: Callable[..., Tensor | None] = _on_cpu if device == "cpu" else partial(_on_cuda, like)
    if like == "math":
        run = _multiplied_out

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """(B, H, N, D), (B, G, M, D), (B, G, M, E) -> (B, H, N, E). With `enable_gqa` G divides H
        and groups of queries share a key; else G is H."""
        out = (
            run(query, key, value, attn_mask, dropout_p, is_causal, scale)
            if query.ndim == 4 and query.is_meta
            else None
        )
        if out is not None:
            return out
        return stock(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    return attention


def choose(query: Tensor, value: Tensor, masked: bool) -> Kernel:
    """The kernel that CUDA takes from compute capability 8.0 (sdp_utils.cpp: flash comes first).

    Capability 9.0 and above may take cuDNN's, which saves the same tensors as flash.
    """
    largest = max(query.shape[-1], value.shape[-1])
    if not masked and query.dtype in HALVES and largest <= FLASH_HEAD:
        return "flash"
    step = 16 // query.element_size()
    if query.dtype in (*HALVES, torch.float32) and not (
        query.shape[-1] % step or value.shape[-1] % step
    ):
        return "efficient"
    return "math"


def _multiplied_out(*given: Any) -> Tensor | None:
    """The stock function on meta tensors: the whole matrix of scores."""
    return None


def _on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor | None:
    """Flash for all that has no dropout; None: the stock function multiplies it out."""
    if dropout or query.shape[-1] != value.shape[-1] or (mask is not None and mask.requires_grad):
        return None
    out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, causal, attn_mask=_additive(mask, query.dtype), scale=scale
    )[0]
    return out


def _on_cuda(
    like: Like,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor | None:
    """Flash, memory-efficient, or None: the stock function multiplies it out."""
    kernel = choose(query, value, mask is not None) if like == "device" else like
    if kernel == "efficient" and key.shape[1] != query.shape[1]:
        kernel = "math"  # it knows no groups
    if kernel == "flash":
        size = query.shape[-1]
        padded = [_pad(t, ALIGNMENT) for t in (query, key, value)]
        out: Tensor = aten._scaled_dot_product_flash_attention(
            *padded, dropout, causal, False, scale=scale or 1 / math.sqrt(size)
        )[0]
        return out if out.shape[-1] == size else out[..., :size]
    if kernel == "efficient":
        if mask is not None:
            mask = _broadcast(_additive(mask, query.dtype), query, key)
        grad = any(t.requires_grad for t in (query, key, value)) and torch.is_grad_enabled()
        result: Tensor = aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, grad, dropout, causal, scale=scale
        )[0]
        return result
    return None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask of truth values as one to be added, as PyTorch makes it."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    shown, hidden = (
        torch.scalar_tensor(value, dtype=dtype, device=mask.device) for value in (0.0, -math.inf)
    )
    return torch.where(mask, shown, hidden)


def _pad(tensor: Tensor, step: int) -> Tensor:
    """The last dimension filled up to a multiple of `step`."""
    short = -tensor.shape[-1] % step
    return torch.nn.functional.pad(tensor, (0, short)) if short else tensor


def _broadcast(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask as the memory-efficient kernel wants it: rows aligned, expanded without memory."""
    if mask is None:
        return None
    tokens = key.shape[-2]
    shape = (*query.shape[:3], tokens)
    return _pad(mask, ALIGNMENT)[..., :tokens].expand(shape)


def workspace(device: str) -> Mapping[Any, Callable[..., int]]:
    """Operation -> bytes that its kernel on `device` allocates inside and frees before it returns.

    CUDA: the backward pass of flash attention sums the queries' gradient in float32 and keeps one
    float32 per row (mha_bwd in flash_api.cpp); the memory-efficient one's buffer likewise
    (workspace_gq in kernel_backward.h). The CPU's kernel takes some hundred KiB a thread, which is
    not counted.
    """
    if device == "cpu":
        return {}
    return {
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
        aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    }


def _flash_backward(grad: Tensor, query: Tensor, *rest: Any, **options: Any) -> int:
    batch, heads, rows, size = query.shape
    padded = batch * heads * _up(rows, FLASH_ROWS)
    return 4 * padded * _up(size, 32) + 4 * padded


def _efficient_backward(grad: Tensor, query: Tensor, *rest: Any, **options: Any) -> int:
    batch, heads, rows, size = query.shape
    sums = (
        0
        if query.dtype == torch.float32
        else batch * heads * _up(rows, EFFICIENT_ROWS) * _up(size, 32)
    )
    return 4 * sums + 4 * batch * heads * rows


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
