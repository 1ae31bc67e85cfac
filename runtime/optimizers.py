"""Builds the optimizer that a plan names, and moves its state to the host and back exactly."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from compiler.optimizers import OPTIMIZERS
from compiler.plan import Optimizer
from runtime.errors import MachineUnfit


def make_optimizer(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    device: torch.device,
) -> torch.optim.Optimizer:
    """The plan's optimizer over `named_parameters`, on `device`.

    Raises MachineUnfit if its package is missing or the device has no fused kernel of it.
    """
    facts = OPTIMIZERS[optimizer.name]
    module, _, name = facts.path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MachineUnfit(
            f"optimizer `{facts.name}` needs the package `{facts.extra}`: {error}",
            help=f"pip install {facts.extra}",
        ) from error
    arguments = {**facts.constants, **optimizer.arguments}
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    if optimizer.fused:
        if device.type not in facts.fused:
            raise MachineUnfit(f"optimizer `{facts.name}` has no fused kernel on {device.type}")
        arguments["fused"] = True
    made = cls(list(named_parameters), lr=optimizer.lr, **arguments)
    assert isinstance(made, torch.optim.Optimizer)
    return made


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from the next update on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def host_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of `state_dict()` in host memory, which later updates don't touch."""
    copied = to_host(optimizer.state_dict())
    assert isinstance(copied, dict)
    return copied


def to_host(tree: Any) -> Any:
    """Copy of `tree` (nested dicts, lists, tuples) with every tensor copied to host memory."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: to_host(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(to_host(value) for value in tree)
    return tree


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `host_state` gave, bit for bit.

    `Optimizer.load_state_dict` casts every state to its parameter's type: an optimizer that keeps
    float32 states for bfloat16 weights would go on from rounded ones. Those are put back here.
    """
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        loaded = optimizer.state[parameters[index]]
        for key, value in saved.items():
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device, copy=True)
