"""From transformers' names of a CLIP text encoder to those in whole model files.

Files hold the smaller CLIP under transformers' own names (with the wrapper `text_model`, which the
library has dropped since), and OpenCLIP's under the names of mlfoundations/open_clip,
src/open_clip/transformer.py: there query, key and value are one matrix, and the projection is
multiplied from the other side.
"""

from __future__ import annotations

import re
from functools import partial

from torch import Tensor

from runtime.export.lazy import Lazy, Tensors
from runtime.export.mmdit import Place, arranged

WRAPPER = "text_model."
PROJECTION = "text_projection.weight"

OUTER = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
INNER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
FUSED = ("q_proj", "k_proj", "v_proj")
IDS = "embeddings.position_ids"  # numbers that need not be stored


def transformers_names(tensors: Tensors) -> Tensors:
    """As files hold the smaller CLIP, without a prefix."""
    found = {name.removeprefix(WRAPPER): lazy for name, lazy in tensors.items()}
    return {
        name if name == PROJECTION else WRAPPER + name: lazy
        for name, lazy in found.items()
        if name != IDS
    }


def open_clip_names(tensors: Tensors) -> Tensors:
    """As files hold OpenCLIP, without a prefix. Raises KeyError for a name that has no place."""
    bare = {name.removeprefix(WRAPPER): lazy for name, lazy in tensors.items()}
    bare.pop(IDS, None)
    projection = bare.pop(PROJECTION, None)
    found = arranged(bare, _target)
    if projection is not None:
        rows, columns = projection.shape
        found["text_projection"] = Lazy(
            shape=(columns, rows),
            dtype=projection.dtype,
            read=partial(_transposed, projection),
        )
    return found


def _target(name: str) -> tuple[str, Place]:
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return OUTER[name], Place("")
    block, module, leaf = f"transformer.resblocks.{match[1]}", match[2], match[3]
    part = module.removeprefix("self_attn.")
    if part in FUSED:
        return f"{block}.attn.in_proj_{leaf}", Place("", FUSED.index(part), len(FUSED))
    return f"{block}.{INNER[module]}.{leaf}", Place("")


def _transposed(lazy: Lazy) -> Tensor:
    return lazy.read().T.contiguous()
