"""From Diffusers' names of Lumina-Image 2.0 to those that were published.

Source: Alpha-VLLM/Lumina-Image-2.0, models/model.py. Query, key and value are one layer there; keys
and values have fewer heads than queries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from attrs import evolve

from runtime.export.lazy import Tensors
from runtime.export.mmdit import Place, arranged, fused

BLOCK: Mapping[str, Place] = {
    **fused("attention.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.to_out.0": Place("attention.out"),
    "feed_forward.linear_1": Place("feed_forward.w1"),
    "feed_forward.linear_2": Place("feed_forward.w2"),
    "feed_forward.linear_3": Place("feed_forward.w3"),
    "norm1.linear": Place("adaLN_modulation.1"),
    "attn.norm_q": Place("attention.q_norm"),
    "attn.norm_k": Place("attention.k_norm"),
    "norm1": Place("attention_norm1"),  # where time does not modulate
    "norm1.norm": Place("attention_norm1"),
    "norm2": Place("attention_norm2"),
    "ffn_norm1": Place("ffn_norm1"),
    "ffn_norm2": Place("ffn_norm2"),
}
"""Within `layers.N`, `noise_refiner.N` and `context_refiner.N`, which are called alike."""

OUTER: Mapping[str, Place] = {
    "x_embedder": Place("x_embedder"),
    "time_caption_embed.timestep_embedder.linear_1": Place("t_embedder.mlp.0"),
    "time_caption_embed.timestep_embedder.linear_2": Place("t_embedder.mlp.2"),
    "time_caption_embed.caption_embedder.0": Place("cap_embedder.0"),
    "time_caption_embed.caption_embedder.1": Place("cap_embedder.1"),
    "norm_out.linear_1": Place("final_layer.adaLN_modulation.1"),
    "norm_out.linear_2": Place("final_layer.linear"),
}


def place(module: str, config: Mapping[str, Any]) -> Place:
    """Where the module called `module` goes, in a transformer of this configuration. Raises
    KeyError."""
    match = re.fullmatch(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(.+)", module)
    if match is None:
        return OUTER[module]
    found = BLOCK[match[2]]
    head = int(config["hidden_size"]) // int(config["num_attention_heads"])
    less = head * int(config.get("num_kv_heads") or config["num_attention_heads"])
    rows = (int(config["hidden_size"]), less, less) if found.parts > 1 else ()
    return evolve(found, module=f"{match[1]}.{found.module}", rows=rows)


def laid_out(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """All tensors of a transformer under the published names, without a prefix. The last norm that
    published files hold besides is used by nobody. Raises KeyError for a name that the layout does
    not have."""
    return arranged(tensors, partial(_target, config=config))


def _target(name: str, config: Mapping[str, Any]) -> tuple[str, Place]:
    module, _, leaf = name.rpartition(".")
    there = place(module, config)
    return f"{there.module}.{leaf}", there
