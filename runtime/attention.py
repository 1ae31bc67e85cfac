"""Attention by another kernel than PyTorch's own choice, through Diffusers' dispatcher.

Some processors ask the dispatcher (Flux, Flux.2, Z-Image, Qwen-Image); others (Sana, Stable
Diffusion, PixArt, Lumina) call `scaled_dot_product_attention` themselves (Diffusers 0.42), where
`model.set_attention_backend` changes nothing. Here the processors stay what they are, code and all,
but find other functions under both names, which ask the dispatcher for the kernel. Nothing else in
the process is changed. It holds wherever a block runs: also where checkpointing runs it again, and
under `torch.compile`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from compiler.attention import KERNELS
from compiler.plan import AttentionKernel
from runtime.errors import MachineUnfit
from runtime.machine import version

CALLED = "scaled_dot_product_attention"
ASKED = "dispatch_attention_fn"
Attention = Callable[..., Tensor]


def use_attention(model: nn.Module, name: AttentionKernel) -> int:
    """Let all attention of `model` that multiplies queries by keys be computed by `name`.

    "native" leaves everything as it is. Returns how many modules were changed; linear attention,
    as Sana's, has no kernels to choose from.
    """
    if name == "native":
        return 0
    count = 0
    for module in model.modules():
        cls: type = type(getattr(module, "processor", None))
        if {CALLED, ASKED} & set(_names_in(cls)):
            module.processor = _turned(cls, name)()
            count += 1
    return count


def check_attention(name: AttentionKernel, device: str) -> None:
    """Raise MachineUnfit if the kernel can't work here: before anything else is done."""
    row = KERNELS[name]
    if device not in row.devices:
        raise MachineUnfit(f"attention `{name}` does not run on {device}")
    if row.package and not version(row.package):
        raise MachineUnfit(
            f"attention `{name}` needs the package {row.package}, which is not installed",
            help=f"pip install {row.package}, or --set speed.attention=native",
        )


def on_meta(name: AttentionKernel) -> Attention:
    """What runs on meta tensors; the memory simulation puts the like of the kernel here."""
    stock: Attention = functional.scaled_dot_product_attention
    return stock


def _names_in(cls: type) -> tuple[str, ...]:
    called = vars(cls).get("__call__")
    return called.__code__.co_names if isinstance(called, types.FunctionType) else ()


@cache
def _turned(cls: type, name: AttentionKernel) -> type:
    """The processor class `cls` whose call finds the kernel in place of what it asks for."""
    stock: Any = vars(cls)["__call__"]
    # Without `__name__` torch.compile looks names up here, not in the module they come from.
    scope = {k: v for k, v in stock.__globals__.items() if k != "__name__"}
    attention = _dispatched(name)
    scope["F"] = types.SimpleNamespace(**{**vars(functional), CALLED: attention})
    scope[ASKED] = _in_its_layout(attention)
    call = types.FunctionType(
        stock.__code__, scope, stock.__name__, stock.__defaults__, stock.__closure__
    )
    call.__kwdefaults__ = stock.__kwdefaults__
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _dispatched(name: AttentionKernel) -> Attention:
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    backend = AttentionBackendName(KERNELS[name].backend)

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
        """(B, H, N, D), (B, H, M, D), (B, H, M, E) -> (B, H, N, E)."""
        rest: dict[str, Any] = {
            "attn_mask": attn_mask,
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
        }
        if query.is_meta:
            return on_meta(name)(query, key, value, **rest)
        turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out: Tensor = dispatch_attention_fn(*turned, **rest, backend=backend)
        return out.transpose(1, 2)

    return attention


def _in_its_layout(attention: Attention) -> Attention:
    """`attention` as the dispatcher's own function is called; what that is told of back ends and
    devices is of no account."""

    def asked(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        backend: object = None,
        parallel_config: object = None,
        **rest: Any,
    ) -> Tensor:
        """(B, N, H, D), (B, M, H, D), (B, M, H, E) -> (B, N, H, E)."""
        turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return attention(*turned, **rest).transpose(1, 2)

    return asked
