"""Makes PyTorch take, for meta tensors, the branches that it takes on another device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.fx.experimental import _config as fx_config
from torch.nn import functional, init
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes

from compiler.attention import KERNELS
from compiler.plan import AttentionKernel
from runtime import attention, build
from runtime.memory.attention import Attention, attention_for
from runtime.memory.norms import norm_for
from runtime.memory.tracker import Tracker
from runtime.quantise import codes

STARTS = tuple(name for name in dir(init) if name.endswith("_") and not name.startswith("_"))
"""What sets the values that weights start from, in place."""
SKIPS = ("_ignore_bidirectional_mask_sdpa", "_ignore_causal_mask_sdpa")
"""Where transformers looks into a prompt's mask, whether it can do without."""


@contextmanager
def as_on(device: str, capability: str = "") -> Iterator[None]:
    """Inside, meta tensors are treated as tensors on `device` ("cpu", "cuda", ...), for CUDA of
    that compute capability ("8.9"); "" is taken for 8.0 or more.

    Functions are exchanged, not intercepted: an interception by torch's function modes is off while
    checkpointed blocks are recomputed in the backward pass. Not for use in several threads.
    """
    # Gradient norms are taken over all tensors at once everywhere, on the CPU as well; fused
    # optimizers are there everywhere; others run over all tensors at once except on the CPU.
    lists: list[tuple[Any, str]] = [
        (_foreach_utils, "_get_foreach_kernels_supported_devices"),
        (optimizer, "_get_fused_kernels_supported_devices"),
    ]
    if device != "cpu":
        lists.append((optimizer, "_get_foreach_kernels_supported_devices"))
    from diffusers.hooks import group_offloading
    from transformers import masking_utils

    stock = functional.scaled_dot_product_attention
    number = float(capability or 0)
    with ExitStack() as stack:
        # A mask selects at most everything; what it selects is not known without data.
        _exchange(stack, fx_config, "meta_nonzero_assume_all_nonzero", True)
        chosen = attention_for(device, stock, capability=number)
        _exchange(stack, functional, "scaled_dot_product_attention", chosen)
        _exchange(stack, attention, "on_meta", _like(device, stock, number))
        for name in STARTS:
            _exchange(stack, init, name, _valued(getattr(init, name)))
        # Diffusers' pipelines ask each module of the model whether it has put a part elsewhere.
        _exchange(stack, group_offloading, "_get_top_level_group_offload_hook", lambda _: None)
        for name in SKIPS:
            _exchange(stack, masking_utils, name, _unpadded(getattr(masking_utils, name)))
        for owner, name in lists:
            _exchange(stack, owner, name, _with_meta(getattr(owner, name)))
        if device != "cpu":
            _exchange(stack, functional, "dropout", _fused_dropout(functional.dropout))
        if device == "cuda":
            _exchange(stack, functional, "rms_norm", norm_for(functional.rms_norm))
        yield


@contextmanager
def masks_kept(padded: Callable[[], bool]) -> Iterator[None]:
    """Inside, text encoders can't do without the mask of a prompt that is `padded`: of most prompts
    it hides something. Not for use in several threads."""
    from transformers import masking_utils

    def kept(stock: Callable[..., bool]) -> Callable[..., bool]:
        def skips(padding_mask: Tensor | None, *rest: Any) -> bool:
            return not (padding_mask is not None and padded()) and stock(padding_mask, *rest)

        return skips

    with ExitStack() as stack:
        for name in SKIPS:
            _exchange(stack, masking_utils, name, kept(getattr(masking_utils, name)))
        yield


@contextmanager
def shortened(again: Sequence[int]) -> Iterator[None]:
    """Inside, the blocks with these numbers are those that are recomputed."""
    with ExitStack() as stack:
        _exchange(stack, build, "recomputed", lambda *_: again)
        yield


@contextmanager
def remembering(tracker: Tracker, known: dict[Any, Dequantised]) -> Iterator[None]:
    """Inside, a weight that is turned back is not computed: its memory is counted as it was seen to
    be, once for each form of codes and weight (`known`)."""
    stock = codes.dequantised

    def dequantised(
        given: Tensor, scales: Tensor, kind: Any, shape: Any, dtype: torch.dtype, *rest: Any
    ) -> Tensor:
        if not given.is_meta:
            return stock(given, scales, kind, shape, dtype, *rest)
        key = (given.shape, scales.shape, kind, shape, dtype)
        if key not in known:
            inputs = [t for t in (given, scales, *rest) if isinstance(t, Tensor)]
            run = partial(stock, given, scales, kind, shape, dtype, *rest)
            known[key] = _seen(tracker, inputs, run)
        seen = known[key]
        tracker.workspace(seen.most, tracker.category)
        if math.prod(seen.shape) == seen.elements:  # a permutation of what its storage holds
            return torch.empty_strided(seen.shape, seen.stride, dtype=dtype, device="meta")
        whole = torch.empty(seen.elements, dtype=dtype, device="meta")
        return whole.as_strided(seen.shape, seen.stride)

    with ExitStack() as stack:
        _exchange(stack, codes, "dequantised", dequantised)
        yield


def _seen(tracker: Tracker, inputs: list[Tensor], run: Callable[[], Tensor]) -> Dequantised:
    """What `run` makes of `inputs`, under a tracker of its own like `tracker`."""
    with _disable_current_modes(), Tracker(tracker.devices, tracker.kernels) as own:
        own.register(inputs, "inputs")
        before = own.current
        own.reset_peak()
        made = run()
        elements = made.untyped_storage().nbytes() // made.element_size()
        return Dequantised(own.peak - before, elements, tuple(made.shape), made.stride())


@frozen
class Dequantised:
    """A weight that was turned back: bytes at most on the way, and what came out."""

    most: int
    elements: int  # of its storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _exchange(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _like(
    device: str, stock: Attention, capability: float
) -> Callable[[AttentionKernel], Attention]:
    """A kernel's like on `device`: what `runtime.attention` runs on meta tensors."""
    return lambda name: attention_for(device, stock, KERNELS[name].like, capability)


def _unpadded(stock: Callable[..., bool]) -> Callable[..., bool]:
    """A mask without data is that of a prompt of full length: it hides nothing."""

    def skips(padding_mask: Tensor | None, *rest: Any) -> bool:
        if padding_mask is not None and padding_mask.is_meta:
            padding_mask = torch.ones(padding_mask.shape, dtype=torch.bool, device="cpu")
        return stock(padding_mask, *rest)

    return skips


def _valued(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What has no values needs none to start from."""

    def start(tensor: Tensor, *rest: Any, **options: Any) -> Tensor:
        return tensor if tensor.is_meta else stock(tensor, *rest, **options)

    return start


def _with_meta(devices: Callable[[], list[str]]) -> Callable[[], list[str]]:
    return lambda: [*devices(), "meta"]


def _fused_dropout(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Accelerators keep a mask of one byte per element, the CPU one of the input's type."""

    def dropout(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or not 0 < p < 1 or inplace or not input.is_meta:
            return stock(input, p, training, inplace)
        return torch.native_dropout(input, p, training)[0]

    return dropout
