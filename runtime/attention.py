"""Attention by another kernel than PyTorch's own choice, through Diffusers' dispatcher.

The attention of Sana and of Stable Diffusion 3 does not ask the dispatcher: its processors call
`scaled_dot_product_attention` themselves (Diffusers 0.42), so `model.set_attention_backend` changes
nothing there. Here the processors stay what they are, code and all, but find another function under
that name, which asks the dispatcher. Nothing else in the process is changed. It holds wherever a
block runs: also where checkpointing runs it again, and under `torch.compile`.
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
        if CALLED in _names_in(cls):
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
    """The processor class `cls` whose call finds the dispatcher's function as `F`'s."""
    stock: Any = vars(cls)["__call__"]
    # Without `__name__` torch.compile looks names up here, not in the module they come from.
    scope = {k: v for k, v in stock.__globals__.items() if k != "__name__"}
    scope["F"] = types.SimpleNamespace(**{**vars(functional), CALLED: _dispatched(name)})
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
    ) -> Tensor:
        """(B, H, N, D), (B, H, M, D), (B, H, M, E) -> (B, H, N, E)."""
        if query.is_meta:
            return on_meta(name)(query, key, value, attn_mask, dropout_p, is_causal)
        turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out: Tensor = dispatch_attention_fn(
            *turned, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, backend=backend
        )
        return out.transpose(1, 2)

    return attention
