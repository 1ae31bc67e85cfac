"""What the families with a UNet of Diffusers (UNet2DConditionModel) have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_PLACES = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)"
BLOCKS = (rf"{_PLACES}\.(resnets\.\d+|attentions\.\d+\.transformer_blocks\.\d+)",)
"""What Diffusers recomputes at once: residual blocks, and the blocks of its transformers."""

_ATTENTION = rf"{_PLACES}\.attentions\.\d+\.transformer_blocks\.\d+\.attn[12]"
TARGET_SETS: Mapping[str, tuple[str, ...]] = {
    # The example scripts' own: self- and cross-attention.
    "attention": (rf"{_ATTENTION}\.(to_[qkv]|to_out\.0)",),
    "attention-cross": (
        rf"{_PLACES}\.attentions\.\d+\.transformer_blocks\.\d+\.attn2\.(to_[qkv]|to_out\.0)",
    ),
    "all-linear": (
        rf"{_ATTENTION}\.(to_[qkv]|to_out\.0)",
        rf"{_PLACES}\.attentions\.\d+\.transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
        rf"{_PLACES}\.attentions\.\d+\.proj_(in|out)",
    ),
}


def depth(config: Mapping[str, Any]) -> int:
    """How many modules `BLOCKS` matches in a UNet of this configuration.

    A level has as many residual blocks as `layers_per_block` on the way down and one more on the
    way up, the middle two; where it attends, a transformer follows each of them, in the middle one.
    """
    down, up = config["down_block_types"], config["up_block_types"]
    layers = _each(config.get("layers_per_block", 2), len(down))
    deep = _each(config.get("transformer_layers_per_block", 1), len(down))
    middle = 2
    if "CrossAttn" in (config.get("mid_block_type") or "UNetMidBlock2DCrossAttn"):
        middle += deep[-1]
    total = middle
    for kind, count, inside in zip(down, layers, deep, strict=True):
        total += count * (1 + inside * ("CrossAttn" in kind))
    for kind, count, inside in zip(up, reversed(layers), reversed(deep), strict=True):
        total += (count + 1) * (1 + inside * ("CrossAttn" in kind))
    return total


def _each(value: int | Sequence[int], count: int) -> list[int]:
    return [int(value)] * count if isinstance(value, int) else [int(each) for each in value]


def shortened(config: Mapping[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """UNets have no runs of equal blocks, so none is ever shortened."""
    raise AssertionError("a UNet is simulated whole")
