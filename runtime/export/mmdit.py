"""From Diffusers' names of Stable Diffusion 3 to those of the MMDiT that Stability AI published.

Source: Stability-AI/sd3-ref, mmdit.py. There query, key and value are one layer, rows one after the
other, and modulations that end a stream give shift before scale (Diffusers: scale before shift).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from attrs import frozen
from torch import Tensor

from runtime.export.lazy import Lazy, Tensors


@frozen
class Place:
    """Where a module's rows go. `part` counts within a layer that `parts` modules share."""

    module: str
    part: int = 0
    parts: int = 1
    swapped: bool = False  # the two halves of the rows change places
    rows: tuple[int, ...] = ()  # of each part, where they differ


def fused(target: str, *names: str) -> dict[str, Place]:
    """Modules `names` whose rows follow each other in the layer `target`."""
    return {name: Place(target, part, len(names)) for part, name in enumerate(names)}


BLOCK: Mapping[str, Place] = {
    **fused("x_block.attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    **fused("x_block.attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v"),
    **fused("context_block.attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.norm_q": Place("x_block.attn.ln_q"),
    "attn.norm_k": Place("x_block.attn.ln_k"),
    "attn2.norm_q": Place("x_block.attn2.ln_q"),
    "attn2.norm_k": Place("x_block.attn2.ln_k"),
    "attn.norm_added_q": Place("context_block.attn.ln_q"),
    "attn.norm_added_k": Place("context_block.attn.ln_k"),
    "attn.to_out.0": Place("x_block.attn.proj"),
    "attn2.to_out.0": Place("x_block.attn2.proj"),
    "attn.to_add_out": Place("context_block.attn.proj"),
    "norm1.linear": Place("x_block.adaLN_modulation.1"),
    "norm1_context.linear": Place("context_block.adaLN_modulation.1"),
    "ff.net.0.proj": Place("x_block.mlp.fc1"),
    "ff.net.2": Place("x_block.mlp.fc2"),
    "ff_context.net.0.proj": Place("context_block.mlp.fc1"),
    "ff_context.net.2": Place("context_block.mlp.fc2"),
}
"""Within `transformer_blocks.N` here and `joint_blocks.N` there."""

OUTER: Mapping[str, Place] = {
    "pos_embed": Place(""),  # holds the tensor `pos_embed`, which there lies at the top
    "pos_embed.proj": Place("x_embedder.proj"),
    "context_embedder": Place("context_embedder"),
    "time_text_embed.timestep_embedder.linear_1": Place("t_embedder.mlp.0"),
    "time_text_embed.timestep_embedder.linear_2": Place("t_embedder.mlp.2"),
    "time_text_embed.text_embedder.linear_1": Place("y_embedder.mlp.0"),
    "time_text_embed.text_embedder.linear_2": Place("y_embedder.mlp.2"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
    "proj_out": Place("final_layer.linear"),
}


def place(module: str, blocks: int) -> Place:
    """Where the module called `module` goes in a model of `blocks` blocks. Raises KeyError."""
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return OUTER[module]
    found = BLOCK[match[2]]
    ends = match[2] == "norm1_context.linear" and int(match[1]) == blocks - 1
    return Place(f"joint_blocks.{match[1]}.{found.module}", found.part, found.parts, ends)


def laid_out(tensors: Tensors, blocks: int) -> Tensors:
    """All tensors of a transformer under the published names, without the prefix of whole files.

    Raises KeyError for a name that the layout does not have.
    """
    return arranged(tensors, partial(_target, blocks=blocks))


def _target(name: str, blocks: int) -> tuple[str, Place]:
    module, _, leaf = name.rpartition(".")
    there = place(module, blocks)
    return f"{there.module}.{leaf}" if there.module else leaf, there


def arranged(tensors: Tensors, target: Callable[[str], tuple[str, Place]]) -> Tensors:
    """All tensors in another layout: `target` gives, by a tensor's name, its name there and where
    its rows go."""
    rows: dict[str, dict[int, Lazy]] = {}
    for name, lazy in tensors.items():
        new, there = target(name)
        rows.setdefault(new, {})[there.part] = _swapped(lazy) if there.swapped else lazy
    return {name: _joined([parts[i] for i in sorted(parts)]) for name, parts in rows.items()}


def in_rows(parts: Sequence[tuple[Place, Lazy]]) -> Lazy:
    """Parts of one layer, by their places in it; zeros in the rows of those that are missing."""
    first, like = parts[0]
    found = {there.part: _swapped(lazy) if there.swapped else lazy for there, lazy in parts}
    if first.parts == 1:
        return found[first.part]
    rows = first.rows or (like.shape[0],) * first.parts
    return _joined([found.get(part, _zeros(rows[part], like)) for part in range(first.parts)])


def _zeros(rows: int, like: Lazy) -> Lazy:
    shape = (rows, *like.shape[1:])
    dtype = like.dtype
    return Lazy(shape=shape, dtype=dtype, read=lambda: torch.zeros(shape, dtype=dtype))


def halves_swapped(tensor: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return torch.cat(tensor.chunk(2, dim=0)[::-1])


def _swapped(lazy: Lazy) -> Lazy:
    return Lazy(shape=lazy.shape, dtype=lazy.dtype, read=lambda: halves_swapped(lazy.read()))


def _joined(parts: Sequence[Lazy]) -> Lazy:
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.shape[0] for part in parts)
    first = parts[0]
    return Lazy(shape=(rows, *first.shape[1:]), dtype=first.dtype, read=partial(_cat, list(parts)))


def _cat(parts: Sequence[Lazy]) -> Tensor:
    return torch.cat([part.read() for part in parts])
