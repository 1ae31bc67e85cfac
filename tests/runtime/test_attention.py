"""The kernel that a recipe names is the one that every family's attention is computed with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from compiler.families import FAMILIES
from compiler.plan import Speed
from runtime.attention import use_attention
from runtime.step import micro_step
from tests.runtime.memory_cases import small
from tests.runtime.replay import FP32
from tests.runtime.test_fused_projections import example, model_of
from tests.runtime.test_memory_exact import check
from tests.runtime.test_speed import Called

FAST = "aten._scaled_dot_product_flash_attention_for_cpu.default"
MATH = Speed(attention="native-math")


def passed(name: str, speed: Speed) -> tuple[list[str], Tensor, dict[str, Tensor | None]]:
    """Operations, losses and gradients of a step."""
    family, built = model_of(name)
    use_attention(built.model, speed.attention)
    given: tuple[Any, ...] = (example(name), small(name).objective, FP32, 2)
    with Called() as called:
        losses = micro_step(family, built.model, *given)
    return called.names, losses, {n: p.grad for n, p in built.trainable.items()}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_attention_is_computed_by_the_kernel(name: str) -> None:
    """The stock one calls another operation, and gives the same."""
    fast, expected, gradients = passed(name, Speed())
    asked, found, others = passed(name, MATH)
    assert FAST in fast and FAST not in asked
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for label, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(others[label], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["flux", "flux2", "lumina2", "qwen_image", "z_image"])
def test_memory_is_that_of_the_kernel(name: str) -> None:
    check(evolve(small(name), attention="native-math"))
