"""From Diffusers' names of a UNet to those of latent diffusion, and of SDXL as published.

Source: CompVis/latent-diffusion, ldm/modules/diffusionmodules/openaimodel.py, and the same file in
sgm of Stability-AI/generative-models. There the way
down and the way up are one list each: a level has its residual blocks, each with its attention in
the same entry, and then what changes the size (on the way up in the last block's entry).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.export.lazy import Tensors

OUTER: Mapping[str, str] = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESIDUAL: Mapping[str, str] = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PLACE = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_SAMPLER = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(?:down|up)samplers\.0\.conv")


def published(module: str, config: Mapping[str, Any]) -> str:
    """What the module called `module` is called there, in a UNet of this configuration.

    Raises KeyError for a module that the layout does not have.
    """
    if found := _PLACE.fullmatch(module):
        side, level, kind, number, rest = found.groups()
        entry = _entry(side, int(level), config) + int(number)
        side = "input_blocks" if side == "down_blocks" else "output_blocks"
        return f"{side}.{entry}.{_part(kind, rest)}"
    if found := _MIDDLE.fullmatch(module):
        kind, number, rest = found.groups()
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{RESIDUAL[rest] if kind == 'resnets' else rest}"
    if found := _SAMPLER.fullmatch(module):
        return _resampled(found[1], int(found[2]), config)
    return OUTER[module]


def _part(kind: str, rest: str) -> str:
    return f"1.{rest}" if kind == "attentions" else f"0.{RESIDUAL[rest]}"


def _layers(config: Mapping[str, Any]) -> int:
    layers = config.get("layers_per_block", 2)
    if isinstance(layers, Sequence):
        raise KeyError("levels of different depth")
    return int(layers)


def _entry(side: str, level: int, config: Mapping[str, Any]) -> int:
    """Where a level begins in the list; the list of the way down begins with `conv_in`."""
    return level * (_layers(config) + 1) + (side == "down_blocks")


def _resampled(side: str, level: int, config: Mapping[str, Any]) -> str:
    last = _entry(side, level, config) + _layers(config)
    if side == "down_blocks":
        return f"input_blocks.{last}.0.op"
    attends = "CrossAttn" in config["up_block_types"][level]
    return f"output_blocks.{last}.{2 if attends else 1}.conv"


def laid_out(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """All tensors of a UNet under the published names. Raises KeyError for a name that the layout
    does not have."""
    return {_renamed(name, config): lazy for name, lazy in tensors.items()}


def _renamed(name: str, config: Mapping[str, Any]) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{published(module, config)}.{leaf}"
