"""What a step in the middle of a run finds: the optimizer's state, gradients, the average.

An optimizer keeps of a parameter what its shape, type and group tell. So on meta tensors the first
update is run for one parameter of each form, and the others' states are made like its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compiler import plan
from compiler.memory import Candidate
from compiler.optimizers import OPTIMIZERS
from runtime.ema import Ema
from runtime.memory.tracker import Tracker
from runtime.optimizers import grouped, make_optimizer
from runtime.stand_in import simulated
from runtime.step import gradient_norm, update

VALUES = (int, float, bool, str, type(None))


def prime(
    candidate: Candidate, trainable: Mapping[str, nn.Parameter], tracker: Tracker
) -> torch.optim.Optimizer:
    """The optimizer after its first update, so that its state exists, or after the first few, where
    later ones take more."""
    tracker.category = "optimizer"
    device = torch.device(candidate.device)
    meta = next(iter(trainable.values())).is_meta
    named = grouped(trainable.items(), candidate)
    optimizer = (simulated if meta else make_optimizer)(candidate.optimizer, named, device)
    like = _like(optimizer) if meta else {}
    first = [parameter for parameter in trainable.values() if parameter not in like]
    _update(candidate, optimizer, first, tracker)
    left = [one for one, other in like.items() if not _copied(optimizer, one, other, tracker)]
    if left:
        _update(candidate, optimizer, left, tracker)
    return optimizer


def _update(
    candidate: Candidate,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    tracker: Tracker,
) -> None:
    for _ in range(OPTIMIZERS[candidate.optimizer.name].late):
        give_gradients(parameters, tracker)
        update(optimizer, gradient_norm(parameters), candidate.max_grad_norm)


def _like(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, nn.Parameter]:
    """Parameters that have the form of an earlier one in their group, and that one."""
    first: dict[Hashable, nn.Parameter] = {}
    found = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            form = number, parameter.shape, parameter.stride(), parameter.dtype
            other = first.setdefault(form, parameter)
            if other is not parameter:
                found[parameter] = other
    return found


def _copied(
    optimizer: torch.optim.Optimizer, one: nn.Parameter, other: nn.Parameter, tracker: Tracker
) -> bool:
    """Whether `one` could be given a state like that of `other`."""
    state = optimizer.state.get(other)
    tensors: list[Tensor] = []
    if not state or not _plain(state, tensors):
        return False
    if len({value.untyped_storage()._cdata for value in tensors}) < len(tensors):
        return False
    made = iter(tracker.made((t.shape, t.dtype) for t in tensors if t.is_meta))
    optimizer.state[one] = _filled(state, made)
    return True


def _plain(value: Any, tensors: list[Tensor]) -> bool:
    """Whether it holds numbers and the like, and tensors that are alone in storages of their size;
    these are added to `tensors`."""
    if isinstance(value, dict):
        return all(_plain(each, tensors) for each in value.values())
    if isinstance(value, list):
        return all(_plain(each, tensors) for each in value)
    if type(value) is Tensor:
        tensors.append(value)
        return value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return isinstance(value, VALUES)


def _filled(value: Any, made: Iterator[Tensor]) -> Any:
    """The same with tensors of its own, those on "meta" from `made`, in order."""
    if isinstance(value, dict):
        return {name: _filled(each, made) for name, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, made) for each in value]
    if isinstance(value, Tensor):
        return next(made) if value.is_meta else value.clone()
    return value


def give_gradients(parameters: Sequence[nn.Parameter], tracker: Tracker) -> None:
    """Gradients, zero where they have values."""
    if all(parameter.is_meta for parameter in parameters):
        made = tracker.made((p.shape, p.dtype) for p in parameters)
    else:
        made = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, made, strict=True):
        parameter.grad = gradient


def average(
    candidate: Candidate, trainable: Mapping[str, nn.Parameter], tracker: Tracker
) -> Ema | None:
    """What of an average is on the device."""
    if not candidate.ema_on_device:
        return None
    tracker.category = "ema"
    return Ema(plan.Ema(decay=0.999, device="same", every=1), trainable.items())
