"""Codes and scales against torchao's primitives and formulas in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from compiler.plan import Quantisation
from compiler.quantisers import QUANTISERS
from runtime.memory.tracker import Tracker
from runtime.quantise.codes import (
    WORKING,
    dequantised,
    empty,
    nf4_levels,
    normal_float,
    quantised,
)

CPU = torch.device("cpu")
KINDS = tuple(QUANTISERS)
NORMAL_FLOAT = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
SHAPES = [(512, 2048), (24, 40), (7, 3), (1, 1), (5, 33)]  # the last three with a padded group


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def back(weight: Tensor, kind: Quantisation, dtype: torch.dtype = torch.float32) -> Tensor:
    codes, scales = quantised(weight, kind)
    shape = (weight.shape[0], weight.shape[1])
    levels = nf4_levels(CPU) if kind == "nf4" else None
    return dequantised(codes, scales, kind, shape, dtype, levels)


def in_groups(weight: Tensor, size: int) -> Tensor:
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % size))
    return flat.view(-1, size)


def assert_same_but_halfway(ours: Tensor, theirs: Tensor, scaled: Tensor) -> None:
    """torchao multiplies by the reciprocal: a weight halfway between levels may go either way."""
    other = ours.int() != theirs.int()
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert ((scaled[other].frac().abs() - 0.5).abs() < 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_s_error_is_that_of_normal_weights(kind: Quantisation) -> None:
    weight = normal(512, 2048)
    error = (back(weight, kind).double() - weight.double()).pow(2).mean().sqrt()
    found = (error / weight.double().pow(2).mean().sqrt()).item()
    assert found == pytest.approx(QUANTISERS[kind].error, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_table(kind: Quantisation, shape: tuple[int, int]) -> None:
    for codes, scales in (quantised(normal(*shape), kind), empty(kind, *shape, CPU)):
        assert codes.nbytes + scales.nbytes == QUANTISERS[kind].weight_bytes(*shape)
    large = QUANTISERS[kind].weight_bytes(4096, 2048) / (4096 * 2048)
    assert large == QUANTISERS[kind].bytes_per_weight(2048)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_meta_tensors_have_the_same_form(kind: Quantisation, shape: tuple[int, int]) -> None:
    meta = torch.device("meta")
    real = quantised(normal(*shape), kind)
    for made in (empty(kind, *shape, meta), quantised(normal(*shape).to(meta), kind)):
        for one, other in zip(made, real, strict=True):
            assert one.is_meta
            assert (one.shape, one.dtype, one.stride()) == (
                other.shape,
                other.dtype,
                other.stride(),
            )
    levels = nf4_levels(meta) if kind == "nf4" else None
    made_back = dequantised(*empty(kind, *shape, meta), kind, shape, torch.bfloat16, levels)
    assert (made_back.shape, made_back.dtype, made_back.is_meta) == (shape, torch.bfloat16, True)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_torchao_s_symmetric_scheme(shape: tuple[int, int]) -> None:
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    weight = normal(*shape)
    block = (1, shape[1])
    scale, zero = choose_qparams_affine(weight, MappingType.SYMMETRIC, block, torch.int8)
    theirs = quantize_affine(weight, block, scale, zero, torch.int8)
    codes, scales = quantised(weight, "int8")
    assert torch.equal(scales.view(torch.float32), scale.flatten())
    assert_same_but_halfway(codes, theirs, weight / scale.reshape(-1, 1))
    expected = dequantize_affine(codes, block, scale, zero, torch.int8)
    assert torch.equal(dequantised(codes, scales, "int8", shape, torch.float32), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_the_nearest_level_by_torchao_and_by_formula(shape: tuple[int, int]) -> None:
    from torchao.quantization.quant_primitives import quantize_affine

    weight = normal(*shape)
    groups = in_groups(weight, 32)
    codes, scales = quantised(weight, "int4")
    furthest = groups.gather(1, groups.abs().argmax(1, keepdim=True)).flatten()
    scale = scales.view(torch.bfloat16)
    assert torch.equal(scale, (furthest.double() / -8).to(torch.float32).bfloat16())
    low, high = codes.int() & 15, (codes.int() >> 4) & 15
    ours = torch.stack((low, high), -1).view(len(groups), 32)
    ours = torch.where(ours > 7, ours - 16, ours)
    divisors, none = scale.float()[:, None], torch.zeros(len(groups), 1)
    theirs = quantize_affine(groups, (1, 32), divisors, none, torch.int8, -8, 7)
    assert_same_but_halfway(ours, theirs, groups / divisors)
    expected = (ours.double() * scale.double()[:, None]).flatten()[: weight.numel()].view(shape)
    assert torch.equal(back(weight, "int4").double(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_the_nearest_float(shape: tuple[int, int]) -> None:
    weight = normal(*shape)[:32]  # all pairs below
    codes, scales = quantised(weight, "fp8")
    scale = scales.view(torch.float32)
    assert torch.equal(scale, weight.abs().amax(1) / 448)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()].unique()  # all the numbers there are
    scaled = (weight / scale[:, None]).double()
    nearest = (scaled[..., None] - every).abs().amin(-1)
    found = codes.view(torch.float8_e4m3fn).double()
    assert torch.equal((scaled - found).abs(), nearest)
    expected = (found * scale.double()[:, None]).float()
    assert torch.equal(back(weight, "fp8"), expected)


def test_nf4_levels_are_those_published() -> None:
    """arXiv 2305.14314, appendix E; torchao's, from a coarser quantile function, are near."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor

    example = normal(1, 64)
    with torch.no_grad():
        theirs = NF4Tensor.from_tensor(example, block_size=64, scaler_block_size=1).nf4
    assert normal_float() == pytest.approx(NORMAL_FLOAT, abs=1e-6)
    assert normal_float() == pytest.approx(theirs.tolist(), abs=1e-4)
    table = nf4_levels(CPU).view(torch.float32)
    assert table[0x3A].tolist() == [pytest.approx(normal_float()[n]) for n in (0xA, 0x3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_nearest_level(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    groups = in_groups(weight, 64).double()
    _, scales = quantised(weight, "nf4")
    scale = scales.view(torch.bfloat16).double()[:, None]
    assert torch.equal(scale[:, 0].bfloat16(), groups.abs().amax(1).float().bfloat16())
    levels = torch.tensor(normal_float(), dtype=torch.float64)
    nearest = (groups[..., None] - scale[..., None] * levels).abs().amin(-1)
    found = in_groups(back(weight, "nf4"), 64).double()
    torch.testing.assert_close((groups - found).abs(), nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smaller_formats_round_the_same_weight(kind: Quantisation, dtype: torch.dtype) -> None:
    weight = normal(64, 96)
    exact = back(weight, kind)
    found = back(weight, kind, dtype)
    assert found.dtype == dtype
    if kind == "nf4":  # the level is rounded, too
        unit = torch.finfo(dtype).eps / 2
        assert ((found.double() - exact.double()).abs() <= 2.1 * unit * exact.abs().double()).all()
    else:
        assert torch.equal(found, exact.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_special_weights(kind: Quantisation) -> None:
    zero = torch.zeros(4, 64)
    assert torch.equal(back(zero, kind), zero)
    lone = zero.clone()
    lone[2, 5] = -3.0
    found = back(lone, kind)
    assert found[2, 5].item() == pytest.approx(-3.0, rel=0.005)
    assert (found != 0).sum() == 1
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"not finite can't be quantised to {kind}"):
            quantised(torch.full((2, 4), bad), kind)
    codes, scales = quantised(normal(8, 8).bfloat16(), kind)
    assert not codes.is_floating_point() and not scales.is_floating_point()
    assert torch.equal(copy.deepcopy(codes), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_at_a_time(kind: Quantisation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, on meta tensors too; and what is taken on the way."""
    wholes = [quantised(normal(*shape), kind) for shape in SHAPES]
    weight = normal(64, 2048).bfloat16()
    with Tracker({"cpu"}) as tracker:
        tracker.register([weight], "weights")
        codes, scales = quantised(weight, kind)
    most = tracker.peak - weight.nbytes - codes.nbytes - scales.nbytes
    assert 0.5 * WORKING * weight.numel() < most < (WORKING + 0.1) * weight.numel()
    monkeypatch.setattr("runtime.quantise.codes.PIECE", 100)
    for shape, whole in zip(SHAPES, wholes, strict=True):
        for ours, theirs in zip(quantised(normal(*shape), kind), whole, strict=True):
            assert torch.equal(ours, theirs)
        made = quantised(normal(*shape).to("meta"), kind)
        assert [t.shape for t in made] == [t.shape for t in whole]
    with Tracker({"cpu"}) as tracker:
        tracker.register([weight], "weights")
        codes, scales = quantised(weight, kind)
    most = tracker.peak - weight.nbytes - codes.nbytes - scales.nbytes
    assert most < (WORKING + 1) * 64 * 2048  # 64 rows are the groups of the widest


@pytest.mark.parametrize("kind", KINDS)
def test_relative_time_falls_with_the_number_of_tokens(kind: Quantisation) -> None:
    facts = QUANTISERS[kind]
    times = [facts.relative_time(tokens) for tokens in (256, 4096, 65536)]
    assert times == sorted(times, reverse=True) and times[-1] > 1
    assert times[0] == pytest.approx(1 + facts.traffic * 200 / 512)
