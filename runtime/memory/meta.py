"""Runs operations on meta tensors quickly.

PyTorch's own meta kernels are written in Python and cost about 200 microseconds each. A model of
equal blocks calls the same operation on tensors of the same shape again and again, so the first
result's form (shape, strides, type) is kept and later ones are made from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from runtime.memory.forms import CONTAINERS, RULES, Form, channels_last
from runtime.memory.tracker import SEVERAL

META = torch.device("meta")

# Updates in place that PyTorch has no meta kernel for; they make nothing.
WITHOUT_META = (torch.ops.aten._fused_sgd_, torch.ops.aten._fused_adagrad_)

# A yes or no in Python. Models ask whether a mask lets everything through, and here each does:
# prompts are as long as they may be.
ASKED = torch.ops.aten._local_scalar_dense.default

Key = tuple[Any, ...]


# Makes the zeros without memory that stand for the derivative of a constant. What is made of them
# is known as such by more than its form.
ZEROS = torch.ops.aten._efficientzerotensor.default

SPECIAL = {
    id(getattr(packet, name))
    for packet in (*WITHOUT_META, ASKED.overloadpacket, ZEROS.overloadpacket)
    for name in packet.overloads()
}

# Updates of whole lists of tensors in place, which return nothing.
OF_LISTS = re.compile(r"aten::_(foreach|fused)_\w+_")


@frozen
class _Known:
    """What a key's operation returns. `forms` None: run it (a view)."""

    forms: tuple[Form, ...] | None
    container: type | None  # that they are in; None: a single one
    in_place: bool
    flops: int
    bytes: int = 0  # of a single output's storage


class MetaKernels:
    """Callable for `Tracker(kernels=...)`; counts floating-point operations on the way.

    `counters` maps an operation (overload packet) to a function of its arguments and its result
    that gives its count, as `torch.utils.flop_counter.flop_registry` does. `device` is the type of
    the device that the results are to have the form of.
    """

    def __init__(self, counters: Mapping[Any, Callable[..., int]], device: str):
        self.counters = counters
        self.device = device
        self.flops = 0
        self.fresh: int | None = None  # see `Kernels`
        self._known: dict[Key, _Known] = {}
        self._zeros = False  # whether there may be such (`ZEROS`)
        self._of_lists: dict[int, bool] = {}  # operation -> whether it is one of `OF_LISTS`

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`func`'s result; operations on other devices (a step counter on the CPU) really run."""
        self.fresh = None
        if func.is_view:
            return func(*args, **kwargs)
        name = id(func)  # operations live for ever, and hashing one is slow
        if name in SPECIAL or self._zeros:
            if func is ZEROS:
                self._zeros = True
            if func is ZEROS or any(isinstance(t, Tensor) and t._is_zerotensor() for t in args):
                return func(*args, **kwargs)
            if func.overloadpacket in WITHOUT_META:
                return None
            if func is ASKED and args[0].is_meta and args[0].dtype == torch.bool:
                return True
        if args and isinstance(args[0], list) and self._nothing(func, name, args[0]):
            return None
        key: list[Any] = [name]
        if not _describe(args, key) or (kwargs and not _describe(kwargs.items(), key)):
            return func(*args, **kwargs)
        known = self._known.get(whole := tuple(key))
        if known is None:
            return self._first(whole, func, args, kwargs)
        self.flops += known.flops
        if known.in_place:
            return args[0]
        if known.forms is None:
            return func(*args, **kwargs)
        if known.container is None:
            self.fresh = known.bytes
            return _make(known.forms[0])
        return known.container(map(_make, known.forms))

    @property
    def known(self) -> int:
        """How many calls' results are known."""
        return len(self._known)

    def learned(self, since: int) -> list[tuple[Key, _Known]]:
        """What was learned since so many were `known`; for `learn` in a process of this one."""
        return list(islice(self._known.items(), since, None))

    def learn(self, learned: Iterable[tuple[Key, _Known]]) -> None:
        """What others know."""
        for key, known in learned:
            self._known.setdefault(key, known)

    def _nothing(self, func: Any, name: int, updated: list[Any]) -> bool:
        """Whether all that `func` does is to change `updated`, which have no values."""
        found = self._of_lists.get(name)
        if found is None:
            found = OF_LISTS.fullmatch(func._schema.name) is not None and not func._schema.returns
            self._of_lists[name] = found
        return found and all(isinstance(tensor, Tensor) and tensor.is_meta for tensor in updated)

    def _first(self, key: Key, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        out = _by_rule(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        if self.device == "cpu" and func is torch.ops.aten.native_layer_norm.default:
            out = _layer_norm_on_cpu(out, *args)
        if func is torch.ops.aten.convolution.default:
            out = _laid_out(out, *args[:2])
        counter = self.counters.get(func.overloadpacket)
        flops = int(counter(*args, **kwargs, out_val=out)) if counter else 0
        self.flops += flops
        self._known[key] = _learn(func, args, kwargs, out, flops)
        return out


def _by_rule(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result where a rule tells its form, else None."""
    rule = RULES.get(id(func))
    forms = rule(args, kwargs) if rule is not None else None
    if forms is None:
        return None
    container = CONTAINERS.get(id(func))
    return _make(forms[0]) if container is None else container(map(_make, forms))


def _laid_out(out: Tensor, given: Tensor, weight: Tensor) -> Tensor:
    """Devices give channels last where either has them last; PyTorch's meta kernel does not."""
    last = next((x for x in map(channels_last, (given, weight)) if x is not None), None)
    return out if last is None else out.to(memory_format=last)


def _layer_norm_on_cpu(
    out: tuple[Tensor, Tensor, Tensor], given: Tensor, shape: Any, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU keeps mean and deviation in the weight's or the input's type, not in float32."""
    kept = given.dtype if weight is None else weight.dtype
    return out[0], out[1].to(kept), out[2].to(kept)


def _describe(values: Iterable[Any], described: list[Any]) -> bool:
    """Add a hashable account of `values`, tensors by their form; False if one is not on "meta"."""
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_meta:
                return False
            described += (value.shape, value.stride(), value.dtype)
        elif isinstance(value, SEVERAL):
            inside: list[Any] = []
            if not _describe(value, inside):
                return False
            described.append(tuple(inside))
        else:
            described += (type(value), value)
    return True


def _learn(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any, flops: int
) -> _Known:
    """What may be kept of the result: its forms if all of it is new memory."""
    single = isinstance(out, Tensor)
    outputs, container = (out,) if single else out, None if single else type(out)
    if single and args and out is args[0]:
        return _Known(None, None, True, flops)
    given = {t.untyped_storage()._cdata for t in _tensors((*args, *kwargs.values()))}
    fresh = isinstance(outputs, tuple | list) and all(
        o is None or (isinstance(o, Tensor) and o.is_meta) for o in outputs
    )
    if not fresh or func._schema.is_mutable:
        return _Known(None, container, False, flops)
    stores = [o.untyped_storage()._cdata for o in outputs if o is not None]
    if len(set(stores)) < len(stores) or given & set(stores):  # aliases that no schema admits
        return _Known(None, container, False, flops)
    held = out.untyped_storage().nbytes() if single else 0
    return _Known(tuple(map(_form, outputs)), container, False, flops, held)


def _tensors(values: tuple[Any, ...] | list[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found.extend(_tensors(value))
    return found


def _form(tensor: Tensor | None) -> Form:
    return None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _make(form: Form) -> Tensor | None:
    if form is None:
        return None
    return torch.empty_strided(form[0], form[1], dtype=form[2], device=META)
