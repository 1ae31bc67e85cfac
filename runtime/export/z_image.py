"""From Diffusers' names of Z-Image to those of ComfyUI's files.

Source: comfyanonymous/ComfyUI, comfy/ldm/lumina/model.py and comfy/utils.py (z_image_to_diffusers).
Query, key and value are one layer there, equally high; the first and the last layer have no size of
their patches in their names. All else is called alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attrs import evolve

from runtime.export.lazy import Tensors
from runtime.export.mmdit import Place, arranged, fused

ATTENTION: Mapping[str, Place] = {
    **fused("qkv", "to_q", "to_k", "to_v"),
    "to_out.0": Place("out"),
    "norm_q": Place("q_norm"),
    "norm_k": Place("k_norm"),
}
"""Within `attention` of each block."""
ENDS = re.compile(r"all_(x_embedder|final_layer)\.\d+-1")


def laid_out(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """All tensors of a transformer under the names of ComfyUI, without a prefix. Raises KeyError
    for a name that the layout does not have, and where a model has patches of several sizes."""
    if len(config.get("all_patch_size", (2,))) > 1:
        raise KeyError("all_patch_size")
    return arranged(tensors, _target)


def _target(name: str) -> tuple[str, Place]:
    block, inside, own = name.partition(".attention.")
    if not inside:
        return ENDS.sub(r"\1", name), Place(name)
    module, _, leaf = own.rpartition(".")
    there = evolve(ATTENTION[module], module=f"{block}.attention.{ATTENTION[module].module}")
    return f"{there.module}.{leaf}", there
