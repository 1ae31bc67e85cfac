"""Forms of results that follow from a rule, against what PyTorch's own meta kernels give."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.memory.forms import CONTAINERS, RULES, Form
from runtime.memory.meta import MetaKernels

aten = torch.ops.aten
SHAPES: list[tuple[int, ...]] = [
    (),
    (1,),
    (3,),
    (0, 3),
    (1, 3),
    (2, 1),
    (2, 3),
    (4, 1, 3),
    (1, 2, 3),
    (4, 2, 3),
    (4, 2, 1),
    (2, 1, 1, 3),
    (2, 2, 3, 3),
]
PAIRS = [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor]
ALIKE = [aten.gelu_backward.default, aten.silu_backward.default]
SINGLE = [aten.gelu.default, aten.silu.default]
NUMBERS = [aten.mul.Scalar, aten.pow.Tensor_Scalar, aten.mul.Tensor, aten.add.Tensor]


def form_of(tensor: Tensor | None) -> Form:
    return None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype)


def tensors(dtype: torch.dtype) -> list[Tensor]:
    """Row by row, the other way round, and with rows that lie apart."""
    rows = [torch.empty(shape, dtype=dtype, device="meta") for shape in SHAPES]
    columns = [
        torch.empty(shape[::-1], dtype=dtype, device="meta").permute(*range(len(shape) - 1, -1, -1))
        for shape in SHAPES
        if len(shape) > 1
    ]
    apart = [
        torch.empty([size + 2 for size in shape], dtype=dtype, device="meta")[
            tuple(slice(0, size) for size in shape)
        ]
        for shape in SHAPES
    ]
    return rows + columns + apart


def calls(dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """Operations and arguments that go together."""
    given = tensors(dtype)
    other = tensors(torch.float16)[:6]
    found: list[tuple[Any, tuple[Any, ...]]] = []
    for one, two in product(given, [*given, *other]):
        try:
            torch.broadcast_shapes(one.shape, two.shape)
        except RuntimeError:
            continue
        found += [(operation, (one, two)) for operation in PAIRS]
        if one.shape == two.shape and one.dtype == two.dtype:
            found += [(operation, (one, two)) for operation in ALIKE]
    for one in given:
        found += [(operation, (one,)) for operation in SINGLE]
        found += [(operation, (one, number)) for operation in NUMBERS for number in (2, 0.5, True)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_elementwise_results_have_the_form_that_pytorch_gives(dtype: torch.dtype) -> None:
    ruled = 0
    for operation, arguments in calls(dtype):
        real = [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype)
            if isinstance(each, torch.Tensor)
            else each
            for each in arguments
        ]
        try:
            stock = operation(*real)
        except (RuntimeError, TypeError):  # no such operation on whole numbers
            continue
        forms = RULES[id(operation)](arguments, {})
        if forms is not None:
            ruled += 1
            assert forms == [form_of(stock)], (operation, *map(form_of, arguments[:1]))
    assert ruled > 1000 if dtype.is_floating_point else not ruled


@pytest.mark.parametrize("added", [(3,), (2, 3)])
@pytest.mark.parametrize("turned", [False, True])
def test_products_have_the_form_that_pytorch_gives(added: tuple[int, ...], turned: bool) -> None:
    one = torch.empty(2, 5, device="meta")
    other = torch.empty(3, 5, device="meta").t() if turned else torch.empty(5, 3, device="meta")
    arguments = torch.empty(added, device="meta"), one, other
    stock = aten.addmm.default(*arguments)
    forms = RULES[id(aten.addmm.default)](arguments, {})
    assert forms == [form_of(stock)]


def norms(dtype: torch.dtype, weights: torch.dtype | None) -> list[tuple[Any, tuple[Any, ...]]]:
    """Normalisations and arguments that go together."""
    weight = None if weights is None else torch.empty(16, dtype=weights, device="meta")
    found: list[tuple[Any, tuple[Any, ...]]] = []
    images: list[tuple[int, ...]] = [(2, 16, 3, 5), (1, 16, 1, 1), (1, 16, 6)]
    sequences: list[tuple[int, ...]] = [(2, 3, 16), (1, 1, 16), (16,)]
    for shape in images:
        given = torch.empty(shape, dtype=dtype, device="meta")
        for each in (given, given.transpose(-1, -2) if given.ndim == 4 else given):
            sizes = (*shape[:2], prod(shape[2:]), 4)
            found.append((aten.native_group_norm.default, (each, weight, weight, *sizes, 1e-5)))
    for shape in sequences:
        rows = torch.empty(shape, dtype=dtype, device="meta")
        for each in (rows, torch.empty((16, *shape[:-1]), device="meta").movedim(0, -1).to(dtype)):
            found.append((aten.native_layer_norm.default, (each, [16], weight, weight, 1e-5)))
            kept = [torch.empty((*shape[:-1], 1), device="meta")] * 2
            for wanted in ([True, False, False], [True, True, True]):
                backward = aten.native_layer_norm_backward.default
                found.append((backward, (rows, each, [16], *kept, weight, weight, wanted)))
    return found


@pytest.mark.parametrize("weights", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_have_the_forms_that_pytorch_gives(
    dtype: torch.dtype, weights: torch.dtype | None
) -> None:
    ruled = set()
    for operation, arguments in norms(dtype, weights):
        forms = RULES[id(operation)](arguments, {})
        if forms is None:
            continue
        stock: Any = operation(*arguments)
        assert type(stock) is CONTAINERS[id(operation)]
        assert forms == [form_of(tensor) for tensor in stock], (operation, *map(form_of, arguments))
        ruled.add(operation)
    assert len(ruled) == (3 if dtype != torch.float64 else 2)


def test_norms_of_many_tensors_have_the_forms_that_pytorch_gives() -> None:
    many = [torch.empty(2, 3, dtype=d, device="meta") for d in (torch.float32, torch.bfloat16)]
    stock: Any = aten._foreach_norm.Scalar(many, 2)
    assert type(stock) is CONTAINERS[id(aten._foreach_norm.Scalar)]
    assert RULES[id(aten._foreach_norm.Scalar)]((many, 2), {}) == list(map(form_of, stock))
    stacked = aten.stack.default(stock[:1] * 3)
    assert RULES[id(aten.stack.default)]((stock[:1] * 3,), {}) == [form_of(stacked)]
    rows = [torch.empty(3, device="meta")] * 2
    assert RULES[id(aten.stack.default)]((rows,), {}) is None
    assert RULES[id(aten.stack.default)]((stock,), {}) is None  # of two types


def test_updates_of_lists_are_left_out_on_meta_tensors_alone() -> None:
    kernels = MetaKernels({}, "cpu")
    real = [torch.ones(2), torch.ones(3)]
    assert kernels(aten._foreach_mul_.Scalar, (real, 3.0), {}) is None
    assert [tensor.tolist() for tensor in real] == [[3.0] * 2, [3.0] * 3]
    unset = [torch.ones(2, device="meta")]
    assert kernels(aten._foreach_mul_.Scalar, (unset, 3.0), {}) is None
    assert not kernels.known
    made = kernels(aten._foreach_norm.Scalar, (unset, 2), {})
    assert isinstance(made, list) and kernels.known == 1
    again = kernels(aten._foreach_norm.Scalar, (unset, 2), {})
    assert isinstance(again, list) and again[0].shape == made[0].shape and again[0] is not made[0]


def test_what_another_process_has_learned_is_known() -> None:
    one, other = MetaKernels({}, "cpu"), MetaKernels({}, "cpu")
    arguments = (torch.ones(2, 3, device="meta"),)
    one(aten.sin.default, arguments, {})
    other.learn(one.learned(0))
    assert other.known == 1 and not one.learned(1)
    assert other(aten.sin.default, arguments, {}).shape == (2, 3)
