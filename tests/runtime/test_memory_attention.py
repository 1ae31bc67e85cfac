"""Attention on CUDA: which kernel is taken, and what its backward pass allocates, by formula.

The formulas are those of PyTorch's sources: sdp_utils.cpp, attention_backward.cu, flash_api.cpp and
kernel_backward.h (with the kernels of generate_kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor
from torch.nn import functional

from compiler.memory import Candidate
from compiler.plan import Phase
from runtime.memory.attention import Kernel, choose, workspace
from runtime.memory.pretend import as_on
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.tracker import Tracker
from tests.runtime.memory_cases import small

MODEL = RuntimeMemoryModel()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BATCH, HEADS, TOKENS = 2, 4, 200


@pytest.mark.parametrize(
    ("capability", "dtype", "head", "masked", "kernel"),
    [
        (7.5, BF16, 64, False, "math"),  # flash is there from 8.0 on, bfloat16 as well
        (7.5, BF16, 64, True, "math"),
        (7.5, FP16, 64, False, "efficient"),
        (7.0, FP16, 64, True, "efficient"),
        (7.5, FP16, 60, True, "math"),  # halves are multiplied by tensor cores from 7.0 on
        (6.1, FP16, 60, True, "efficient"),
        (7.5, FP32, 62, False, "efficient"),  # single numbers from 8.0 on
        (8.0, FP32, 62, False, "math"),
        (8.0, BF16, 64, False, "flash"),
        (8.6, BF16, 64, True, "efficient"),
        (0.0, BF16, 64, False, "flash"),  # not known
    ],
)
def test_choice_by_compute_capability(
    capability: float, dtype: torch.dtype, head: int, masked: bool, kernel: Kernel
) -> None:
    query = torch.empty(1, 2, 5, head, dtype=dtype, device="meta")
    assert choose(query, query, masked, capability) == kernel


def train(step: Candidate) -> Phase:
    return next(phase for phase in MODEL.simulate(step).phases if phase.name == "train")


@pytest.mark.parametrize("family", ["sd3", "pixart"])  # without and with a mask
def test_bfloat16_before_ampere_keeps_the_scores(family: str) -> None:
    """A plan in bf16 for such a device is that of the kernel which multiplies out the matrix."""
    given: dict[str, Any] = {"rank": 4, "device": "cuda", "compute": "bfloat16"}
    step = small(family, shapes=((512, 512, 2),), **given)
    old, new = (evolve(step, capability=number) for number in ("7.5", "8.0"))
    assert train(new) == train(step)
    assert train(old) == train(evolve(old, attention="native-math"))
    assert train(old).device_bytes > 1.2 * train(new).device_bytes
    single = small(family, shapes=((512, 512, 2),), **{**given, "compute": "float32"})
    assert train(evolve(single, capability="7.5")) == train(single)


def test_encoders_are_simulated_by_compute_capability() -> None:
    """What is known of encoders on one device is not taken for another."""
    step = small("sana", device="cuda", compute="bfloat16", tokens=256)
    found = [
        [(p.name, p.parts) for p in MODEL.simulate(evolve(step, capability=number)).phases]
        for number in ("7.5", "8.6", "7.5")
    ]
    assert found[0] == found[2] != found[1]


def by_heads(size: int, dtype: torch.dtype, heads: int = HEADS) -> Tensor:
    """(B, H, N, D), lying so: two kinds of tokens put together after they were split by heads."""
    shape = (BATCH, heads, TOKENS, size)
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def by_tokens(size: int, dtype: torch.dtype, heads: int = HEADS) -> Tensor:
    """(B, H, N, D), lying as (B, N, H, D): a projection split by heads."""
    shape = (BATCH, TOKENS, heads, size)
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True).transpose(1, 2)


def inside(query: Tensor, key: Tensor, gradient: Tensor, masked: bool = False) -> int:
    """Bytes that the backward pass of attention is said to allocate inside."""
    said = []

    def noted(count: Callable[..., int]) -> Callable[..., int]:
        def run(*given: Any, **options: Any) -> int:
            said.append(count(*given, **options))
            return said[-1]

        return run

    kernels = {operation: noted(count) for operation, count in workspace("cuda").items()}
    mask = torch.zeros(BATCH, 1, 1, TOKENS, dtype=query.dtype, device="meta") if masked else None
    with as_on("cuda"), Tracker({"meta"}, workspaces=kernels):
        out = functional.scaled_dot_product_attention(query, key, key, attn_mask=mask)
        torch.autograd.grad(out, query, gradient.detach())
    assert len(said) == 1
    return said[0]


ELEMENTS = BATCH * HEADS * TOKENS * 64  # of queries
ROWS = 4 * BATCH * HEADS  # bytes of a float32 for each row of a head's tokens
FLASH = ROWS * 256 * (64 + 1)  # sums and a number a row: 200 tokens in steps of 128
EFFICIENT = ROWS * (256 * 64 + TOKENS)  # likewise: 200 tokens in tiles of 64


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_flash_copies_what_does_not_lie_by_tokens(dtype: torch.dtype) -> None:
    """Its output lies as the queries do: `out.contiguous()`, `grad_out.contiguous()` after both
    are turned to (B, N, H, D)."""
    heads, tokens = by_heads(64, dtype), by_tokens(64, dtype)
    assert inside(tokens, tokens, tokens) == FLASH
    assert inside(heads, heads, tokens) == FLASH + 2 * ELEMENTS
    assert inside(tokens, heads, tokens) == FLASH
    assert inside(tokens, tokens, heads) == FLASH + 2 * ELEMENTS
    assert inside(heads, heads, heads) == FLASH + 2 * 2 * ELEMENTS


@pytest.mark.parametrize(
    ("size", "padded"), [(40, 64), (72, 96), (128, 128), (160, 192), (200, 256)]
)
def test_flash_sums_in_padded_heads(size: int, padded: int) -> None:
    query = by_tokens(size, BF16)
    assert inside(query, query, query) == ROWS * 256 * (padded + 1)


def test_flash_makes_a_gradient_for_each_head_that_shares_a_key() -> None:
    query, key = by_tokens(64, BF16), by_tokens(64, BF16, HEADS // 2)
    assert inside(query, key, query) == FLASH + 2 * 2 * ELEMENTS


def test_the_memory_efficient_kernel_copies_the_gradient_alone() -> None:
    heads, tokens = by_heads(64, BF16), by_tokens(64, BF16)
    for query in (heads, tokens):
        assert inside(query, query, tokens, masked=True) == EFFICIENT
        assert inside(query, query, heads, masked=True) == EFFICIENT + 2 * ELEMENTS


@pytest.mark.parametrize(
    ("size", "tile", "padded"), [(40, 64, 64), (64, 64, 64), (72, 128, 128), (160, 128, 192)]
)
def test_the_memory_efficient_kernel_sums_in_tiles(size: int, tile: int, padded: int) -> None:
    query, tokens = by_tokens(size, BF16), -(-TOKENS // tile) * tile
    assert inside(query, query, query, masked=True) == ROWS * (tokens * padded + TOKENS)


def test_in_float32_it_multiplies_the_output_by_its_gradient() -> None:
    """What comes of it is summed, and turned: the product and two numbers a row. Or the sums in
    tiles, where these are more."""
    few = by_tokens(64, FP32)
    assert inside(few, few, few) == EFFICIENT > ROWS * TOKENS * (64 + 2)
    size, rows = 128, ROWS * 1024
    large = torch.empty(BATCH, 1024, HEADS, size, device="meta", requires_grad=True).transpose(1, 2)
    assert inside(large, large, large) == rows * (size + 2)  # 1024 tokens are whole tiles
