"""The kernels that attention can be computed with, as rows of facts.

What has no row is left to the device: PyTorch's own function takes the fastest of its kernels.
Names of back ends are those of Diffusers' dispatcher (models/attention_dispatch.py of 0.42; what
each refuses is what its functions there raise). What kernels need of the device: FlashAttention 2
compute capability 8.0 and 16 bits, FlashAttention 3 capability 9.0 (README of
Dao-AILab/flash-attention); cuDNN's 8.0, as the memory-efficient one for bfloat16 (sdp_utils.cpp
of PyTorch). SageAttention has no backward pass (README of thu-ml/SageAttention).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import frozen

from compiler.plan import AttentionKernel, Device, Dtype

HALVES: tuple[Dtype, ...] = ("bfloat16", "float16")
ALL: tuple[Dtype, ...] = ("float32", *HALVES)


@frozen(kw_only=True)
class AttentionFacts:
    """One kernel."""

    name: AttentionKernel
    backend: str  # in Diffusers' dispatcher
    package: str = ""  # to install; "": PyTorch's own
    devices: tuple[Device, ...] = ("cuda",)
    formats: tuple[Dtype, ...] = ALL
    capability: float = 0.0  # CUDA compute capability at least
    bf16_capability: float = 0.0  # of bfloat16, where that needs more
    masks: bool = True  # takes a mask
    backward: bool = True  # has derivatives
    like: Literal["device", "flash", "efficient", "math"]
    """Whose memory it takes: of the device's own choice, or of one of PyTorch's kernels."""


KERNELS: Mapping[AttentionKernel, AttentionFacts] = {
    row.name: row
    for row in (
        AttentionFacts(
            name="native", backend="native", devices=("cpu", "cuda", "mps", "xpu"), like="device"
        ),
        AttentionFacts(
            name="native-flash",
            backend="_native_flash",
            formats=HALVES,
            capability=8.0,
            masks=False,
            like="flash",
        ),
        AttentionFacts(
            name="native-efficient",
            backend="_native_efficient",
            bf16_capability=8.0,
            like="efficient",
        ),
        AttentionFacts(
            name="native-cudnn",
            backend="_native_cudnn",
            formats=HALVES,
            capability=8.0,
            like="flash",
        ),
        AttentionFacts(
            name="native-math",
            backend="_native_math",
            devices=("cpu", "cuda", "mps", "xpu"),
            like="math",
        ),
        AttentionFacts(
            name="flash",
            backend="flash",
            package="flash-attn",
            formats=HALVES,
            capability=8.0,
            masks=False,
            like="flash",
        ),
        AttentionFacts(
            name="flash-3",
            backend="_flash_3",
            package="flash-attn-3",
            formats=HALVES,
            capability=9.0,
            masks=False,
            like="flash",
        ),
        AttentionFacts(name="xformers", backend="xformers", package="xformers", like="efficient"),
        AttentionFacts(
            name="sage",
            backend="sage",
            package="sageattention",
            formats=HALVES,
            capability=8.0,
            masks=False,
            backward=False,
            like="flash",
        ),
    )
}


def packages() -> tuple[str, ...]:
    """What some kernel needs besides PyTorch."""
    return tuple(row.package for row in KERNELS.values() if row.package)
