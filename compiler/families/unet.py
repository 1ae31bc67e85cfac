"""What the families with a UNet of Diffusers (UNet2DConditionModel) have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

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


Told = Literal["prompt", "sizes", "sizes and score", "sizes, by a language model", "else"]


def told(config: Mapping[str, Any]) -> Told:
    """What a UNet of this configuration is told, by which its family is known. A language model's
    states have a layer of their own. Sizes and cuts are six numbers beside the last encoder's
    pooled state; with a score instead of a target size they are five, beside the one encoder's,
    which is as wide as all of its states."""
    added, projected = config.get("addition_embed_type"), config.get("encoder_hid_dim_type")
    if added is None and projected is None:
        return "prompt"
    if added != "text_time":
        return "else"
    if projected is not None:
        return "sizes, by a language model" if projected == "text_proj" else "else"
    numbers = 5 * int(config.get("addition_time_embed_dim") or 0)
    pooled = int(config.get("projection_class_embeddings_input_dim") or 0) - numbers
    return "sizes and score" if pooled == config.get("cross_attention_dim") else "sizes"


def probes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """What tells a UNet of this configuration by the shapes of its tensors, under the names of
    latent diffusion's own code (see `runtime.export.sgm`)."""
    widths = [int(width) for width in config["block_out_channels"]]
    layers, first = int(config.get("layers_per_block", 2)), widths[0]
    entries = len(widths) * (layers + 1)
    deep = _each(config.get("transformer_layers_per_block", 1), len(widths))
    found: dict[str, tuple[int, ...] | None] = {
        "input_blocks.0.0.weight": (first, int(config.get("in_channels", 4)), 3, 3),
        f"output_blocks.{entries - 1}.0.emb_layers.1.weight": (first, 4 * first),
        f"output_blocks.{entries}.0.emb_layers.1.weight": None,
        "label_emb.0.0.weight": None,
    }
    for level, kind in enumerate(config["down_block_types"]):
        place = f"input_blocks.{1 + level * (layers + 1)}.1.transformer_blocks"
        if "CrossAttn" not in kind:
            found[f"{place}.0.attn2.to_k.weight"] = None
            continue
        width = int(config["cross_attention_dim"])
        found[f"{place}.{deep[level] - 1}.attn2.to_k.weight"] = (widths[level], width)
        found[f"{place}.{deep[level]}.attn2.to_k.weight"] = None
    if config.get("addition_embed_type") == "text_time":
        told = int(config["projection_class_embeddings_input_dim"])
        found["label_emb.0.0.weight"] = (4 * first, told)
    return found


def depth(config: Mapping[str, Any]) -> int:
    """How many modules `BLOCKS` matches in a UNet of this configuration."""
    return sum(count for _, count in places(config))


def places(config: Mapping[str, Any]) -> list[tuple[int | None, int]]:
    """(level, blocks) of each transformer and (None, blocks) of each group of residual blocks, in
    the order in which Diffusers holds them: the way down, the way up, the middle.

    A level has as many residual blocks as `layers_per_block` on the way down and one more on the
    way up, the middle two; where it attends, a transformer follows each of them, in the middle one.
    """
    down, up = config["down_block_types"], config["up_block_types"]
    layers = _each(config.get("layers_per_block", 2), len(down))
    deep = _each(config.get("transformer_layers_per_block", 1), len(down))
    last = len(down) - 1
    found: list[tuple[int | None, int]] = []
    for level, kind in enumerate(down):
        found += [(level, deep[level])] * (layers[level] * ("CrossAttn" in kind))
        found.append((None, layers[level]))
    for number, kind in enumerate(up):
        level = last - number
        found += [(level, deep[level])] * ((layers[level] + 1) * ("CrossAttn" in kind))
        found.append((None, layers[level] + 1))
    if "CrossAttn" in (config.get("mid_block_type") or "UNetMidBlock2DCrossAttn"):
        found.append((last, deep[last]))
    return [*found, (None, 2)]


def _each(value: int | Sequence[int], count: int) -> list[int]:
    return [int(value)] * count if isinstance(value, int) else [int(each) for each in value]


def runs(config: Mapping[str, Any]) -> list[int] | None:
    """Blocks in each transformer of a level, from the highest resolution down; the middle one has
    as many as the lowest level's. None where the way up has others."""
    if config.get("reverse_transformer_layers_per_block") is not None:
        return None
    kinds = config["down_block_types"]
    return _each(config.get("transformer_layers_per_block", 1), len(kinds))


def shortened(config: Mapping[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """The configuration with other numbers of blocks in the transformers of each level."""
    return {**config, "transformer_layers_per_block": list(counts)}
