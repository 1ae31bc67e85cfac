"""Optimizers of the table on small weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compiler.optimizers import OPTIMIZERS
from compiler.plan import Optimizer
from runtime.errors import MachineUnfit
from runtime.optimizers import (
    class_of,
    set_lr,
)

CPU = torch.device("cpu")
HERE = [n for n, facts in OPTIMIZERS.items() if "cpu" in facts.devices and not facts.compiled]
FUSED_OR_NOT = [
    (name, fused)
    for name in HERE
    for fused in ((True, False) if "cpu" in OPTIMIZERS[name].fused else (False,))
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def needs(name: str) -> None:
    """Skip where the optimizer's package is not installed."""
    try:
        class_of(OPTIMIZERS[name])
    except MachineUnfit as error:
        pytest.skip(error.message)


def planned(name: str, fused: bool = False, **changes) -> Optimizer:
    needs(name)
    arguments = {**OPTIMIZERS[name].defaults, **changes}
    return Optimizer(name=name, lr=1e-2, arguments=arguments, fused=fused)


def weights(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        n: nn.Parameter(torch.randn(s).to(dtype)) for n, s in {"a": (37, 53), "b": (11,)}.items()
    }


def train(optimizer, parameters, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        set_lr(optimizer, 1e-2 / (1 + step))
        optimizer.step()


def tree_bytes(tree) -> int:
    """Bytes of all tensors in it; of one that wraps others, those of the others."""
    if isinstance(tree, dict):
        return sum(map(tree_bytes, tree.values()))
    if isinstance(tree, list | tuple):
        return sum(map(tree_bytes, tree))
    if hasattr(tree, "__tensor_flatten__"):
        return sum(getattr(tree, name).nbytes for name in tree.__tensor_flatten__()[0])
    return tree.nbytes if isinstance(tree, torch.Tensor) else 0
