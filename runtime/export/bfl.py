"""From Diffusers' names of Flux.1 to those that Black Forest Labs published.

Source: black-forest-labs/flux, src/flux/model.py and modules/layers.py. There query, key and value
are one layer, and in single blocks what the feed-forward starts with is in it too; the last
modulation gives shift before scale (Diffusers: scale before shift).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from attrs import evolve

from runtime.export.lazy import Tensors
from runtime.export.mmdit import Place, arranged, fused

DOUBLE: Mapping[str, Place] = {
    **fused("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    **fused("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.norm_q": Place("img_attn.norm.query_norm"),
    "attn.norm_k": Place("img_attn.norm.key_norm"),
    "attn.norm_added_q": Place("txt_attn.norm.query_norm"),
    "attn.norm_added_k": Place("txt_attn.norm.key_norm"),
    "attn.to_out.0": Place("img_attn.proj"),
    "attn.to_add_out": Place("txt_attn.proj"),
    "norm1.linear": Place("img_mod.lin"),
    "norm1_context.linear": Place("txt_mod.lin"),
    "ff.net.0.proj": Place("img_mlp.0"),
    "ff.net.2": Place("img_mlp.2"),
    "ff_context.net.0.proj": Place("txt_mlp.0"),
    "ff_context.net.2": Place("txt_mlp.2"),
}
"""Within `transformer_blocks.N` here and `double_blocks.N` there."""

SINGLE: Mapping[str, Place] = {
    **fused("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "attn.norm_q": Place("norm.query_norm"),
    "attn.norm_k": Place("norm.key_norm"),
    "norm.linear": Place("modulation.lin"),
    "proj_out": Place("linear2"),
}
"""Within `single_transformer_blocks.N` here and `single_blocks.N` there."""

OUTER: Mapping[str, Place] = {
    "x_embedder": Place("img_in"),
    "context_embedder": Place("txt_in"),
    "time_text_embed.timestep_embedder.linear_1": Place("time_in.in_layer"),
    "time_text_embed.timestep_embedder.linear_2": Place("time_in.out_layer"),
    "time_text_embed.text_embedder.linear_1": Place("vector_in.in_layer"),
    "time_text_embed.text_embedder.linear_2": Place("vector_in.out_layer"),
    "time_text_embed.guidance_embedder.linear_1": Place("guidance_in.in_layer"),
    "time_text_embed.guidance_embedder.linear_2": Place("guidance_in.out_layer"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
    "proj_out": Place("final_layer.linear"),
}
FEED_FORWARD = 4  # times as wide as the attention


def place(module: str, config: Mapping[str, Any]) -> Place:
    """Where the module called `module` goes, in a transformer of this configuration. Raises
    KeyError."""
    match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return OUTER[module]
    found = (SINGLE if match[1] else DOUBLE)[match[3]]
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    rows = (width, width, width, FEED_FORWARD * width) if found.module == "linear1" else ()
    kind = "single_blocks" if match[1] else "double_blocks"
    return evolve(found, module=f"{kind}.{match[2]}.{found.module}", rows=rows)


def laid_out(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """All tensors of a transformer under the published names, which have no prefix. Raises KeyError
    for a name that the layout does not have."""
    return arranged(tensors, partial(_target, config=config))


def _target(name: str, config: Mapping[str, Any]) -> tuple[str, Place]:
    module, _, leaf = name.rpartition(".")
    there = place(module, config)
    return f"{there.module}.{'scale' if there.module.endswith('_norm') else leaf}", there
