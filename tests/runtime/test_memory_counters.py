"""Operations counted, against products counted one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from runtime.memory.counters import COUNTERS
from runtime.memory.meta import MetaKernels
from runtime.memory.tracker import Tracker


def met(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> int:
    """Pairs of an input's element and a weight that a convolution multiplies, padding included: by
    a convolution of ones, each of whose results is how many went into it."""
    ones = functional.conv2d(torch.ones_like(x), torch.ones_like(weight), **options)
    return int(ones.sum())


@pytest.mark.parametrize(
    ("groups", "channels", "out", "kernel", "stride"),
    [(1, 6, 4, 3, 1), (6, 6, 6, 3, 1), (2, 6, 4, 3, 2), (6, 6, 12, 1, 1)],
)
def test_a_convolution_and_its_gradients(
    groups: int, channels: int, out: int, kernel: int, stride: int
) -> None:
    """Two operations a product; the backward pass does twice what the forward pass does."""
    x = torch.zeros(2, channels, 9, 9)
    weight = torch.zeros(out, channels // groups, kernel, kernel)
    products = met(x, weight, groups=groups, stride=stride)  # no padding: all products are real
    kernels = MetaKernels(COUNTERS, "cpu")
    with Tracker({"meta"}, kernels):
        given = x.to("meta").requires_grad_()
        learned = weight.to("meta").requires_grad_()
        made = functional.conv2d(given, learned, groups=groups, stride=stride)
        assert kernels.flops == 2 * products
        made.sum().backward()
    assert kernels.flops == 3 * 2 * products
