"""From the plan's description of a model to one that can be trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve
from torch import nn
from torch.utils.checkpoint import checkpoint

from compiler.plan import (
    Adapter,
    Embeddings,
    Layout,
    Model,
    Plan,
    Precision,
    Speed,
    Sprint,
    TextTraining,
)
from runtime import rng
from runtime.families.base import Family
from runtime.families.common import DTYPES, component_of
from runtime.methods import full, lora
from runtime.methods.base import Built, Grow, load_state, state
from runtime.methods.encoders import with_encoders
from runtime.methods.sprint import prepare as distil
from runtime.modules import blocks_of
from runtime.offload.activations import offload_activations
from runtime.offload.blocks import offload_blocks
from runtime.speed import speed_up

__all__ = ["Built", "build", "load_state", "state", "without_starts"]

AS_WRITTEN = Speed()


def build(
    model: Model,
    adapter: Adapter | None,
    precision: Precision,
    layout: Layout,
    family: Family,
    device: torch.device,
    *,
    empty: bool,
    seed: int,
    sharded: bool = False,
    speed: Speed = AS_WRITTEN,
    sprint: Sprint | None = None,
    text_training: TextTraining | None = None,
    embeddings: Embeddings | None = None,
    grow: Grow | None = None,
) -> Built:
    """The trained component on `device`, with its adapter, in training mode; and the text encoders
    that are trained with it or learn new tokens.

    `grow` gives an adapted model more blocks. `sharded` is for `runtime.sharded`: the model's own
    weights are those to train, and what computes is rounded from them there. `empty` leaves its
    weights unset, for meta tensors. Fresh weights are functions of `seed`.

    Raises ValueError for number formats that don't go together, quantised weights without an
    adapter, and patterns that match nothing.
    """
    check_precision(adapter, precision)
    if adapter is None and layout.offload_blocks:
        raise ValueError("blocks that are trained can't wait on the host: train an adapter")
    dtype = DTYPES[precision.trained if adapter is None else precision.weights]
    name = model.trained_component
    if adapter is None and component_of(model, name).quantize != "none":
        raise ValueError("quantised weights can't be trained: train an adapter on them")
    if empty:
        component = family.empty(model, name, dtype, device)
    else:
        start = rng.key(seed, "weights") % (1 << 63)
        # What is to wait on the host never comes to the device as a whole.
        place = torch.device("cpu") if layout.offload_blocks else device
        component = family.load(model, name, dtype, place, seed=start)
    # Masters beside the model's weights are for computing in another type than is trained.
    kept = evolve(precision, compute=precision.trained) if sharded else precision
    if sprint is not None:
        teacher = _teacher(model, precision, layout, family, device, empty=empty)
        built = distil(component, teacher, sprint, precision, seed)
    elif adapter is None:
        built = full.prepare(component, kept)
    else:
        beside = text_training.encoders if text_training else ()
        built = lora.prepare(
            component, adapter, kept, seed, beside=beside, family=model.family, grow=grow
        )
    speed_up(built.model, family.card, speed)
    checkpoint_blocks(built.model, family.card.blocks, layout.activation_checkpointing)
    if layout.offload_blocks:
        waiting = offload_blocks(built.model, family.card.blocks, layout.offload_blocks, device)
        built = evolve(built, waiting=waiting)
        for parameter in built.trainable.values():
            parameter.data = parameter.data.to(device)
    if layout.offload_activations:
        offload_activations(built.model)
    built.model.train()
    if text_training is not None or embeddings is not None:
        given = (model, text_training, embeddings, precision, family, device)
        built = with_encoders(built, *given, empty=empty, seed=seed)
    return built


def without_starts(plan: Plan) -> Plan:
    """The plan without the files that its adapters and words start from, for weights that are
    loaded anyway: those files need not be there any more."""

    def fresh(adapter: Adapter | None) -> Adapter | None:
        return None if adapter is None else evolve(adapter, start="", start_digest="")

    text, words = plan.text_training, plan.embeddings
    if words is not None:
        tokens = tuple(evolve(each, start="", start_digest="") for each in words.tokens)
        words = evolve(words, tokens=tokens)
    if text is not None:
        text = evolve(text, adapter=fresh(text.adapter))
    return evolve(plan, adapter=fresh(plan.adapter), text_training=text, embeddings=words)


def _teacher(
    model: Model,
    precision: Precision,
    layout: Layout,
    family: Family,
    device: torch.device,
    *,
    empty: bool,
) -> nn.Module:
    """The base once more, to be learned from: frozen, in the type that is computed in."""
    name, dtype = model.trained_component, DTYPES[precision.compute]
    if empty:
        teacher = family.empty(model, name, dtype, device)
    else:
        teacher = family.load(model, name, dtype, device)
    checkpoint_blocks(teacher, family.card.blocks, layout.activation_checkpointing)
    return teacher


def check_precision(adapter: Adapter | None, precision: Precision) -> None:
    """Raise ValueError if the model can't be trained in these number formats."""
    if precision.trained == "float16":
        raise ValueError("float16 weights can't be trained: use float32 masters, or bfloat16")
    if adapter is not None and precision.weights != precision.compute:
        raise ValueError(
            f"frozen weights in {precision.weights} can't compute in {precision.compute}: "
            "make `precision.weights` and `precision.compute` the same"
        )


def checkpoint_blocks(model: nn.Module, lists: tuple[str, ...], every: int) -> None:
    """Recompute every `every`-th block of the module lists `lists` in the backward pass; 0: none.

    Counted from the first block over all lists in turn. The recomputation is exact.
    """
    diffused: Any = model
    if every == 0:
        diffused.disable_gradient_checkpointing()
        return
    blocks = blocks_of(model, lists)
    again = {id(blocks[number]) for number in recomputed(len(blocks), every)}
    diffused.enable_gradient_checkpointing(_run_block(again))


def recomputed(count: int, every: int) -> list[int]:
    """Which of `count` blocks are recomputed: every `every`-th one, none for 0."""
    return list(range(0, count, every)) if every else []


def _run_block(again: set[int]) -> Callable[..., Any]:
    def run(block: nn.Module, *inputs: Any) -> Any:
        if id(block) in again:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    return run
