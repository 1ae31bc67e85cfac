"""From Diffusers' names of Flux.2 to those that Black Forest Labs published.

Source: black-forest-labs/flux2, src/flux2/model.py. Single blocks have one layer for query, key,
value and the feed-forward's start in both; double blocks have query, key and value in one there.
The last modulation gives shift before scale (Diffusers: scale before shift).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    "ff.linear_in": Place("img_mlp.0"),
    "ff.linear_out": Place("img_mlp.2"),
    "ff_context.linear_in": Place("txt_mlp.0"),
    "ff_context.linear_out": Place("txt_mlp.2"),
}
"""Within `transformer_blocks.N` here and `double_blocks.N` there."""

SINGLE: Mapping[str, Place] = {
    "attn.to_qkv_mlp_proj": Place("linear1"),
    "attn.norm_q": Place("norm.query_norm"),
    "attn.norm_k": Place("norm.key_norm"),
    "attn.to_out": Place("linear2"),
}
"""Within `single_transformer_blocks.N` here and `single_blocks.N` there."""

OUTER: Mapping[str, Place] = {
    "x_embedder": Place("img_in"),
    "context_embedder": Place("txt_in"),
    "time_guidance_embed.timestep_embedder.linear_1": Place("time_in.in_layer"),
    "time_guidance_embed.timestep_embedder.linear_2": Place("time_in.out_layer"),
    "time_guidance_embed.guidance_embedder.linear_1": Place("guidance_in.in_layer"),
    "time_guidance_embed.guidance_embedder.linear_2": Place("guidance_in.out_layer"),
    "double_stream_modulation_img.linear": Place("double_stream_modulation_img.lin"),
    "double_stream_modulation_txt.linear": Place("double_stream_modulation_txt.lin"),
    "single_stream_modulation.linear": Place("single_stream_modulation.lin"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
    "proj_out": Place("final_layer.linear"),
}


def place(module: str) -> Place:
    """Where the module called `module` goes. Raises KeyError."""
    match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return OUTER[module]
    found = (SINGLE if match[1] else DOUBLE)[match[3]]
    kind = "single_blocks" if match[1] else "double_blocks"
    return evolve(found, module=f"{kind}.{match[2]}.{found.module}")


def laid_out(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """All tensors of a transformer under the published names, which have no prefix. Raises KeyError
    for a name that the layout does not have."""
    return arranged(tensors, _target)


def _target(name: str) -> tuple[str, Place]:
    module, _, leaf = name.rpartition(".")
    there = place(module)
    return f"{there.module}.{'scale' if there.module.endswith('_norm') else leaf}", there
