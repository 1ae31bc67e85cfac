"""Builds the optimizer that a plan names, and moves its state to the host and back exactly."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compiler.machine import TRITON
from compiler.memory import Candidate
from compiler.optimizers import OPTIMIZERS, OptimizerFacts
from compiler.plan import Optimizer, Plan
from runtime.errors import MachineUnfit
from runtime.machine import compiler, version
from runtime.new_tokens import is_rows
from runtime.out_of_memory import updating

SHARE = "share"
"""Of a group: its learning rate over the run's."""


def make_optimizer(
    optimizer: Optimizer,
    named_parameters: Iterable[Any],
    device: torch.device,
) -> torch.optim.Optimizer:
    """The plan's optimizer over `named_parameters`, on `device`: (name, parameter) each, or groups
    of them, see `grouped`.

    Raises MachineUnfit if its package is missing or the device has no fused kernel of it.
    """
    facts = OPTIMIZERS[optimizer.name]
    cls = class_of(facts)
    if optimizer.fused and device.type not in facts.fused:
        raise MachineUnfit(f"optimizer `{facts.name}` has no fused kernel on {device.type}")
    made = _quietly(cls, list(named_parameters), optimizer.lr, arguments_for(optimizer))
    if facts.averages:
        made.train()  # type: ignore[attr-defined]
    return made


def arguments_for(optimizer: Optimizer) -> dict[str, Any]:
    """What the class of the plan's optimizer is called with, besides parameters and `lr`."""
    facts = OPTIMIZERS[optimizer.name]
    given = {
        facts.renamed.get(key, key): tuple(value) if isinstance(value, list) else value
        for key, value in optimizer.arguments.items()
    }
    fused = {"fused": True} if optimizer.fused else {}
    return {**facts.constants, **given, **fused}


def class_of(facts: OptimizerFacts) -> Callable[..., Any]:
    """The class of a row. Raises MachineUnfit if its package is missing."""
    module, _, name = facts.path.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:  # RuntimeError: bitsandbytes
        package = facts.package or module.partition(".")[0]
        raise MachineUnfit(
            f"optimizer `{facts.name}` needs the package `{package}`: {error}",
            help=f"pip install {package}",
        ) from error
    return found


def _quietly(
    cls: Callable[..., Any], named: list[Any], lr: float, arguments: dict[str, Any]
) -> torch.optim.Optimizer:
    """Made without a word on stdout, where Prodigy tells of its weight decay."""
    with contextlib.redirect_stdout(io.StringIO()):
        made = cls(named, lr=lr, **arguments)
    assert isinstance(made, torch.optim.Optimizer)
    return made


def check_usable(optimizer: Optimizer, device: str) -> None:
    """Raise MachineUnfit if the plan's optimizer can't work here: before anything else is done."""
    facts = OPTIMIZERS[optimizer.name]
    class_of(facts)
    if device not in facts.devices:
        raise MachineUnfit(f"optimizer `{facts.name}` does not run on {device}")
    if facts.compiled and device == "cuda" and not version(TRITON):
        raise MachineUnfit(
            f"optimizer `{facts.name}` compiles its step, which needs the package {TRITON}",
            help=f"pip install {TRITON}",
        )
    if facts.compiled and not compiler():
        raise MachineUnfit(
            f"optimizer `{facts.name}` compiles its step, and there is no C++ compiler",
            help="install g++ or clang, or set CXX to its path",
        )


@contextlib.contextmanager
def kept_weights(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
) -> Iterator[None]:
    """Inside, the weights are those to be judged and kept; afterwards those that are trained.

    They differ under a schedule-free optimizer, which trains at one point and keeps an average.
    Going there and back rounds, so what is trained is copied to host memory and put back exactly:
    looking at a model never changes what becomes of it. Nothing happens under other optimizers.
    """
    turn = getattr(optimizer, "eval", None)
    if turn is None:
        yield
        return
    held = list(parameters)
    copies = [parameter.detach().to("cpu", copy=True) for parameter in held]
    try:
        turn()
        yield
    finally:
        with torch.no_grad(), updating():
            for parameter, copy in zip(held, copies, strict=True):
                parameter.copy_(copy)
        for group in optimizer.param_groups:
            group["train_mode"] = True


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from the next update on, and a group's share of it where it has one."""
    for group in optimizer.param_groups:
        own = lr * group.get(SHARE, 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def grouped(named: Iterable[tuple[str, nn.Parameter]], of: Plan | Candidate) -> list[Any]:
    """What the optimizer is made of: (name, parameter) each, or groups of them where text encoders
    or new tokens have a learning rate of their own."""
    run, groups = of.optimizer.lr, dict[float, list[tuple[str, nn.Parameter]]]()
    for name, parameter in named:
        groups.setdefault(_rate(name, of), []).append((name, parameter))
    if set(groups) <= {run}:
        return [pair for pairs in groups.values() for pair in pairs]
    return [{"params": pairs, "lr": rate, SHARE: rate / run} for rate, pairs in groups.items()]


def _rate(name: str, of: Plan | Candidate) -> float:
    """The learning rate of what is called `name` in training."""
    text, embeddings = of.text_training, of.embeddings
    if embeddings is not None and is_rows(name):
        return embeddings.lr
    if text is not None and name.partition(".")[0] in text.encoders:
        return text.lr
    return of.optimizer.lr


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The plain tensors of the state: of those that wrap others (low-bit states), the others."""
    return [tensor for state in optimizer.state.values() for tensor in _plain(state)]


def _plain(tree: Any) -> list[Tensor]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [tensor for item in tree for tensor in _plain(item)]
    if hasattr(tree, "__tensor_flatten__"):
        return [getattr(tree, name) for name in tree.__tensor_flatten__()[0]]
    return [tree] if isinstance(tree, Tensor) else []


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


@contextlib.contextmanager
def own_arguments(optimizer: torch.optim.Optimizer, chosen: Optimizer) -> Iterator[None]:
    """Inside, a state may be loaded; afterwards the arguments of `chosen` hold again.

    `Optimizer.load_state_dict` takes them from the state: an accepted change of the recipe, of the
    weight decay say, would be lost without a word. Counters beside them stay as they were loaded.
    """
    renamed = OPTIMIZERS[chosen.name].renamed
    keys = {renamed.get(key, key) for key in chosen.arguments}
    held = [{k: group[k] for k in keys & group.keys()} for group in optimizer.param_groups]
    yield
    for group, values in zip(optimizer.param_groups, held, strict=True):
        group.update(values)


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `host_state` gave, bit for bit.

    `Optimizer.load_state_dict` casts every state to its parameter's type: an optimizer that keeps
    float32 states for bfloat16 weights would go on from rounded ones. Those are put back here.
    """
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        loaded = optimizer.state.get(parameters[index])
        if loaded is None:  # kept elsewhere, as it was saved
            continue
        for key, value in saved.items():
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device, copy=True)
