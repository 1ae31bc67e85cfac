"""Compiled blocks, fused projections and TF32: the same formulas, faster, with other last bits.

Compilation is regional: each block of the trained component is compiled by itself, so blocks that
are alike share one graph, and there is one graph for each kind of block and each shape that the
plan's buckets have (shapes are fixed, not symbolic). Only passes with gradients are compiled:
drawing and evaluation, whose shapes are others, run as ever. Parameters keep their names.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from compiler.plan import Plan, Speed
from compiler.shapes import pass_shapes
from runtime.attention import check_attention, use_attention
from runtime.errors import MachineUnfit, RunFailed, first_line
from runtime.fused_projections import fuse
from runtime.machine import compiler, version
from runtime.modules import blocks_of

BACKEND = "inductor"
STATES = "encoder_hidden_states"  # (B, tokens, channels)
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")  # (B, tokens), by either name


def speed_up(model: nn.Module, card: FamilyCard, speed: Speed) -> None:
    """Give `model`, of the family `card`, the plan's attention and memory format, fuse its
    projections and compile its blocks.

    To be called once adapters are in place and before anything is put around the blocks' forward
    passes. Models on the meta device are not compiled: they are simulated as they are written,
    which needs no less memory.
    """
    use_attention(model, speed.attention)
    if speed.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if speed.fused_projections:
        fuse(model, card.cross_attention)
    if speed.compile == "off":
        return
    if speed.tokens:
        _pad_prompts(model, speed.tokens)
    if next(model.parameters()).is_meta:
        return
    for block in blocks_of(model, card.blocks):
        _compile(block)


def check_speed(speed: Speed, device: str) -> None:
    """Raise MachineUnfit if something of it can't work here: before anything else is done."""
    check_attention(speed.attention, device)
    if speed.compile == "off":
        return
    advice = "or --set speed.compile=off"
    if not compiler():
        raise MachineUnfit(
            "compiled blocks need a C++ compiler, and there is none",
            help=f"install g++ or clang, or set CXX to its path, {advice}",
        )
    if device == "cuda" and not version("triton"):
        raise MachineUnfit(
            "compiled blocks need the package triton, which is not installed",
            help=f"pip install triton, {advice}",
        )


def prepare(plan: Plan) -> None:
    """Set what holds for the whole process.

    To be called when the caches are filled, which all runs share: no entry may depend on it.
    """
    if plan.device == "cuda":
        # The older names: after the newer ones (`fp32_precision`) reading these raises, and
        # torch.compile reads them (PyTorch 2.13).
        torch.backends.cuda.matmul.allow_tf32 = plan.speed.tf32
        torch.backends.cudnn.allow_tf32 = plan.speed.tf32
    if plan.speed.compile != "off":
        config: Any = torch._dynamo.config
        count = len(pass_shapes(plan.buckets, plan.steps.micro_batch))
        most = count * _depth(plan)  # if no two blocks were alike
        config.recompile_limit = max(config.recompile_limit, most)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)


def _depth(plan: Plan) -> int:
    card = FAMILIES[plan.model.family]
    config = json.loads(plan.model.configs[plan.model.trained_component])
    return card.depth(config)


def _compile(block: nn.Module) -> None:
    stock = block.forward
    # One whole graph or an error: a block that falls apart, or more shapes than the plan has, would
    # run slower than uncompiled, and silently.
    quick = torch.compile(stock, dynamic=False, fullgraph=True, backend=BACKEND)

    @functools.wraps(stock)
    def forward(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return stock(*arguments, **options)
        try:
            return quick(*arguments, **options)
        except _failures() as error:
            reason = first_line(error.__cause__ or error)
            raise RunFailed(
                f"a block can't be compiled: {reason}",
                help="leave out `compile` in [speed], or --set speed.compile=off",
            ) from error

    block.forward = forward


def _failures() -> tuple[type[BaseException], ...]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, FailOnRecompileLimitHit, InductorError


def _pad_prompts(model: nn.Module, tokens: int) -> None:
    """Bring prompts to `tokens` tokens, masked: what is masked counts exactly nothing."""

    def hook(module: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None
        name = next(name for name in MASKS if name in options)
        states, mask = options[STATES], options[name]
        if mask is None:  # all of it is said, as in a batch of one
            mask = states.new_ones(states.shape[:2], dtype=torch.int64)
        short = tokens - mask.shape[1]
        longer: dict[str, Tensor] = {
            STATES: pad(states, (0, 0, 0, short)),
            name: pad(mask, (0, short)),
        }
        return arguments, {**options, **longer}

    model.register_forward_pre_hook(hook, with_kwargs=True)
