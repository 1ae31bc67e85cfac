"""Forms of results that follow from a rule, against what PyTorch's own meta kernels give."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.memory.meta import PLAIN, MetaKernels

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


def tensors(dtype: torch.dtype) -> list[Tensor]:
    """Row by row, and the other way round."""
    rows = [torch.empty(shape, dtype=dtype, device="meta") for shape in SHAPES]
    columns = [
        torch.empty(shape[::-1], dtype=dtype, device="meta").permute(*range(len(shape) - 1, -1, -1))
        for shape in SHAPES
        if len(shape) > 1
    ]
    return rows + columns


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
        try:
            stock = operation(*arguments)
        except (RuntimeError, TypeError):  # no such operation on whole numbers
            continue
        form = PLAIN[id(operation)](arguments, {})
        if form is not None:
            ruled += 1
            assert form == (tuple(stock.shape), stock.stride(), stock.dtype), operation
    assert ruled > 500 if dtype.is_floating_point else not ruled


@pytest.mark.parametrize("added", [(3,), (2, 3)])
@pytest.mark.parametrize("turned", [False, True])
def test_products_have_the_form_that_pytorch_gives(added: tuple[int, ...], turned: bool) -> None:
    one = torch.empty(2, 5, device="meta")
    other = torch.empty(3, 5, device="meta").t() if turned else torch.empty(5, 3, device="meta")
    arguments = torch.empty(added, device="meta"), one, other
    stock = aten.addmm.default(*arguments)
    form = PLAIN[id(aten.addmm.default)](arguments, {})
    assert form == (tuple(stock.shape), stock.stride(), stock.dtype)


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
