"""More blocks of a model that is being built, each made like one that is there.

To build one through Diffusers, quantise it and put peft's layers in takes ten times as long as to
copy what came of it, where there are no numbers to copy.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from compiler.plan import Model
from runtime.memory.shares import adapted_in, parameters_in
from runtime.modules import blocks_of

_PARTS = ("_parameters", "_buffers", "_modules")


class CantGrow(Exception):
    """Blocks of a kind of which copies may be tied to the first."""


@frozen(kw_only=True)
class Growth:
    """From a model with one block in each place to one with as many as are wanted."""

    least: Model  # the one to build
    counts: Sequence[int]  # how many each of its blocks becomes, in its order
    lists: Sequence[str]  # names of its blocks, see `blocks_of`
    config: Mapping[str, Any]  # of the model with all of them

    def __call__(self, model: nn.Module) -> tuple[int, int]:
        """Grow `model`: how many weights without adapter, and adapted modules, it has more. Raises
        CantGrow for blocks that can't be copied."""
        place_of = {
            id(child): (parent, key)
            for parent in model.modules()
            for key, child in parent._modules.items()
        }
        wanted: dict[int, tuple[nn.Module, list[nn.Module]]] = {}
        parameters = modules = 0
        for block, count in zip(blocks_of(model, self.lists), self.counts, strict=True):
            parent, _ = place_of[id(block)]
            if count > 1 and not isinstance(parent, nn.ModuleList):
                raise CantGrow("a block that stands in no list")
            _, blocks = wanted.setdefault(id(parent), (parent, []))
            with _disable_current_modes():  # whoever counts tensors is told of the whole model's
                blocks += [block, *(_like(block, {}) for _ in range(count - 1))]
            parameters += (count - 1) * parameters_in(block, adapted=True)
            modules += (count - 1) * adapted_in(block)
        for parent, blocks in wanted.values():
            if isinstance(parent, nn.ModuleList):
                if any(child not in blocks for child in parent):
                    raise CantGrow("a list that holds more than blocks")
                parent._modules = {str(n): block for n, block in enumerate(blocks)}
        register: Any = model
        register.register_to_config(**self.config)
        return parameters, modules


def growth(least: Model, counts: Sequence[int], lists: Sequence[str], whole: Model) -> Growth:
    """From `least` to `whole`."""
    name = whole.trained_component
    short, config = (json.loads(model.configs[name]) for model in (least, whole))
    changed = {key: value for key, value in config.items() if short.get(key) != value}
    return Growth(least=least, counts=counts, lists=lists, config=changed)


def _like(module: nn.Module, known: dict[int, Any]) -> nn.Module:
    """A module of the same form, with tensors of its own; all else is shared."""
    if id(module) in known:
        found: nn.Module = known[id(module)]
        return found
    made = known[id(module)] = module.__new__(type(module))
    values = dict(vars(module))
    for name, value in values.items():
        if isinstance(value, OrderedDict) and name not in _PARTS and value:
            raise CantGrow("a hook, which may know whose it is")
        if not name.startswith("_") and _knows(value):
            raise CantGrow("an attribute that holds tensors or modules")
        if isinstance(value, OrderedDict):
            values[name] = OrderedDict()
    values["_parameters"] = {n: _tensor(p, known) for n, p in module._parameters.items()}
    values["_buffers"] = {n: _tensor(b, known) for n, b in module._buffers.items()}
    values["_modules"] = {n: c and _like(c, known) for n, c in module._modules.items()}
    made.__dict__.update(values)
    return made


def _knows(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_knows, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_knows, value))
    return isinstance(value, Tensor | nn.Module) or isinstance(
        getattr(value, "__self__", None), nn.Module
    )


def _tensor(tensor: Any, known: dict[int, Any]) -> Any:
    if tensor is None or id(tensor) in known:
        return tensor if tensor is None else known[id(tensor)]
    if type(tensor) not in (Tensor, nn.Parameter):
        raise CantGrow("a tensor of a kind of its own")
    if tensor.nbytes != tensor.untyped_storage().nbytes():
        raise CantGrow("a part of what others have a part of")
    made: Any = torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    known[id(tensor)] = made
    return made
