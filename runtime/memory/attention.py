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
TILE = 64  # and the memory-efficient kernel's: rows and head sizes
AMPERE, VOLTA = 8.0, 7.0  # compute capabilities

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


def attention_for(
    device: str, stock: Attention, like: Like = "device", capability: float = 0.0
) -> Attention:
    """`scaled_dot_product_attention` as `device` ("cpu", "cuda", ...) runs it; `stock`: PyTorch's.

    `like` is the kernel that was asked for, "device" for the device's own choice, which depends on
    CUDA's compute capability (0: not known). The devices without a rule here (mps, xpu) are taken
    to have CUDA's kernels.
    """
    run: Callable[..., Tensor | None] = partial(_on_cuda, like, capability)
    if device == "cpu":
        run = _on_cpu
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


def choose(query: Tensor, value: Tensor, masked: bool, capability: float = 0.0) -> Kernel:
    """The kernel that CUDA takes (sdp_utils.cpp: flash comes first); a `capability` that is not
    known, 0, is taken for 8.0 or more.

    Before 8.0 there is no flash, and the memory-efficient kernel knows no bfloat16. Capability 9.0
    and above may take cuDNN's, which saves the same tensors as flash.
    """
    largest, half = max(query.shape[-1], value.shape[-1]), query.dtype in HALVES
    old = 0 < capability < AMPERE
    if half and not masked and not old and largest <= FLASH_HEAD:
        return "flash"
    known = query.dtype in (torch.float16, torch.float32) or (half and not old)
    cores = not old or (half and capability >= VOLTA)  # tensor cores want heads aligned
    step = 16 // query.element_size() if cores else 1
    if known and not (query.shape[-1] % step or value.shape[-1] % step):
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
    capability: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor | None:
    """Flash, memory-efficient, or None: the stock function multiplies it out."""
    kernel = like
    if like == "device":
        kernel = choose(query, value, mask is not None, capability)
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

    CUDA: see `_flash_backward` and `_efficient_backward`. The CPU's kernel takes some hundred KiB a
    thread, which is not counted.
    """
    if device == "cpu":
        return {}
    return {
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
        aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    }


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *rest: Any, **options: Any
) -> int:
    """It sums the queries' gradient in float32 and keeps one float32 per row; of keys that several
    heads share it makes a gradient for each head (mha_bwd in flash_api.cpp). It wants the output
    and its gradient to lie by tokens (_flash_attention_backward in attention_backward.cu)."""
    batch, heads, rows, size = query.shape
    padded = batch * heads * _up(rows, FLASH_ROWS)
    sums = 4 * padded * _up(size, 32 if size <= 128 else 64) + 4 * padded
    shared = 0 if key.shape[1] == heads else 2 * batch * heads * key.shape[2] * size
    return sums + shared * query.element_size() + _by_tokens(grad) + _by_tokens(out)


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> int:
    """It sums the queries' gradient in float32, in tiles, and keeps one float32 per row
    (workspace_elements_gq in kernel_backward.h, kNeedsAccumGradQ). In float32 what is kept per row
    is computed before, by a product of the output and its gradient (kKernelComputesDelta). Here it
    is the gradient alone that is to lie by tokens (_efficient_attention_backward in
    attention_backward.cu). Not counted: sums of the keys' and values' gradients, which are there in
    16 bits for heads of more than 128 (on cards with little shared memory of more than 96): 26 MB
    at most, for up to 200 heads in a batch."""
    batch, heads, rows, size = query.shape
    row = 4 * batch * heads * rows
    tile = TILE if size <= TILE else 2 * TILE
    most = row + 4 * batch * heads * _up(rows, tile) * _up(size, TILE)
    if query.dtype == torch.float32:
        most = max(most, row * value.shape[-1] + 2 * row)
    return most + _by_tokens(grad)


def _by_tokens(tensor: Tensor) -> int:
    """Bytes of a copy of (B, H, N, D) that lies as (B, N, H, D); 0 if it does."""
    return 0 if tensor.transpose(1, 2).is_contiguous() else tensor.numel() * tensor.element_size()


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
