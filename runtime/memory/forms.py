"""Forms of operations' results that follow from a rule.

PyTorch's own meta kernels for these are written in Python and cost 0.3 to 10 ms each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

# One output: shape, strides, type; None where the operation returns None.
Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None
Args = tuple[Any, ...]
Rule = Callable[[Args, Mapping[str, Any]], Sequence[Form] | None]

aten = torch.ops.aten


def _rows(shape: Sequence[int], dtype: torch.dtype) -> Form:
    """Of a tensor that lies row by row, strides as PyTorch states them."""
    counts = accumulate((max(size, 1) for size in shape[:0:-1]), operator.mul, initial=1)
    return tuple(shape), tuple(counts)[::-1] if shape else (), dtype


def _by_rows(tensor: Tensor) -> bool:
    """Whether it lies row by row; a dimension of 1 may have any stride where one is asked for."""
    return (tuple(tensor.shape), tensor.stride()) == _rows(tensor.shape, tensor.dtype)[:2]  # type: ignore[index]


def channels_last(tensor: Tensor) -> torch.memory_format | None:
    """The format by which PyTorch takes it to lie channels last, None if it does not. That is told
    by the strides, those of dimensions of size 1 included."""
    found = suggest_memory_format(tensor)
    return None if found == torch.contiguous_format else found


def _in_order(tensor: Tensor) -> bool:
    """Whether it lies row by row, or its rows do with room between them."""
    shape, strides = tensor.shape, tensor.stride()
    inner = (stride * size for stride, size in zip(strides[1:], shape[1:], strict=True))
    return all(strides) and all(map(operator.ge, strides, inner))


def _elementwise(args: Args, kwargs: Mapping[str, Any]) -> Sequence[Form] | None:
    """Of floating-point tensors, one of which has the result's shape, and numbers."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    numbers = [value for value in args if not isinstance(value, Tensor)]
    if not all(t.is_floating_point() and t.numel() for t in tensors) or not (
        all(type(value) in (int, float) for value in numbers)
        and not any(isinstance(value, Tensor) for value in kwargs.values())
    ):
        return None
    shape: Sequence[int] = tensors[0].shape
    if any(t.shape != shape for t in tensors[1:]):
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    if not any(t.shape == shape and _by_rows(t) for t in tensors) or not all(
        map(_in_order, tensors)
    ):
        return None
    dtype = tensors[0].dtype if len(tensors) == 1 else torch.result_type(*tensors[:2])
    return [_rows(shape, dtype)]


def _with_number(args: Args, kwargs: Mapping[str, Any]) -> Sequence[Form] | None:
    """Of two tensors, or of one that lies in any order, and a number: in the same order, those
    dimensions of size 1 included of which strides tell no order (TensorIteratorBase::
    reorder_dimensions; PyTorch's meta kernels order these otherwise)."""
    first, *others = args
    lone = isinstance(first, Tensor) and all(type(value) in (int, float) for value in others)
    if kwargs or not lone or not (first.is_floating_point() and first.numel()):
        return _elementwise(args, kwargs)
    shape, strides = tuple(first.shape), first.stride()
    if not all(strides):
        return None
    placed = list(range(len(shape)))[::-1]
    for last in range(1, len(placed)):
        here = last
        for before in range(last - 1, -1, -1):
            inner, outer = placed[before], placed[here]
            one, other = (strides[inner], shape[inner]), (strides[outer], shape[outer])
            if one > other:
                placed[before], placed[here] = outer, inner
                here = before
            elif one[0] < other[0]:
                break
    found, count = [0] * len(shape), 1
    for dimension in placed:
        found[dimension] = count
        count *= shape[dimension]
    return [(shape, tuple(found), first.dtype)]


def _alike(args: Args, kwargs: Mapping[str, Any]) -> Sequence[Form] | None:
    """Of tensors of one shape and type."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    first = tensors[0]
    if any(t.shape != first.shape or t.dtype != first.dtype for t in tensors):
        return None
    return _elementwise(args, kwargs)


def _addmm(args: Args, kwargs: Mapping[str, Any]) -> Sequence[Form] | None:
    added, one, other = args
    if kwargs or not added.dtype == one.dtype == other.dtype:
        return None
    shape = (one.shape[0], other.shape[1])
    return [_rows(shape, one.dtype)] if added.shape in (shape, shape[1:]) else None


def _group_norm(args: Args, kwargs: Mapping[str, Any]) -> Sequence[Form] | None:
    """Result, means and deviations (B, groups), of what lies row by row."""
    given, _, _, batch, _, _, groups, _ = args
    if not _by_rows(given):
        return None
    each = _rows((batch, groups), given.dtype)
    return [_rows(given.shape, given.dtype), each, each]


def _layer_norm(args: Args, kwargs: Mapping[str, Any]) -> Sequence[Form] | None:
    """Result, means and deviations in float32, of what lies row by row."""
    given, shape, *_ = args
    if given.dtype == torch.float64 or not _by_rows(given):
        return None
    each = _rows((*given.shape[: given.ndim - len(shape)], *(1 for _ in shape)), torch.float32)
    return [_rows(given.shape, given.dtype), each, each]


def _layer_norm_backward(args: Args, kwargs: Mapping[str, Any]) -> Sequence[Form] | None:
    """The gradient of what was given alone."""
    gradient, given, _, _, _, _, _, wanted = args
    if wanted != [True, False, False] or gradient.dtype != given.dtype:
        return None
    return [_rows(given.shape, given.dtype), None, None] if _by_rows(given) else None


def _norms(args: Args, kwargs: Mapping[str, Any]) -> Sequence[Form] | None:
    """One number of each tensor."""
    if kwargs or len(args) > 2:
        return None
    return [((), (), tensor.dtype) for tensor in args[0]]


def _stack(args: Args, kwargs: Mapping[str, Any]) -> Sequence[Form] | None:
    """Of single numbers."""
    first, *others = args[0]
    if kwargs or args[1:] or first.shape or any(t.shape or t.dtype != first.dtype for t in others):
        return None
    return [((len(args[0]),), (1,), first.dtype)]


RULES: Mapping[int, Rule] = {
    id(operation): rule
    for rule, operations in (
        (
            _with_number,
            (
                aten.add.Tensor,
                aten.sub.Tensor,
                aten.mul.Tensor,
                aten.div.Tensor,
                aten.mul.Scalar,
            ),
        ),
        (
            _elementwise,
            (
                aten.pow.Tensor_Scalar,
                aten.gelu.default,
                aten.silu.default,
            ),
        ),
        (_alike, (aten.gelu_backward.default, aten.silu_backward.default)),
        (_addmm, (aten.addmm.default,)),
        (_group_norm, (aten.native_group_norm.default,)),
        (_layer_norm, (aten.native_layer_norm.default,)),
        (_layer_norm_backward, (aten.native_layer_norm_backward.default,)),
        (_norms, (aten._foreach_norm.Scalar,)),
        (_stack, (aten.stack.default,)),
    )
    for operation in operations
}
"""By the operation's `id`, for they live for ever and hashing one is slow."""

CONTAINERS: Mapping[int, type] = {
    id(aten.native_group_norm.default): tuple,
    id(aten.native_layer_norm.default): tuple,
    id(aten.native_layer_norm_backward.default): tuple,
    id(aten._foreach_norm.Scalar): list,
}
"""What their results are in, where they have several."""
