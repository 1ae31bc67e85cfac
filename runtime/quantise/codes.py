"""Weights as codes and scales, and back. See `compiler.quantisers` for the facts of each kind.

Codes and scales are integers throughout: a module's `.to(dtype)` leaves integers alone, so scales
are held as the bits of a floating-point number. All of it runs on meta tensors as well.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from compiler.plan import Quantisation
from compiler.quantisers import QUANTISERS

EIGHT_BITS = {"int8": 127.5, "fp8": 448.0}  # absmax / scale
PIECE = 2**22  # numbers that are quantised at a time, about
WORKING = 13  # bytes for each of them on the way, codes apart (measured; nf4's are most)
SCALES = {4: (torch.float32, torch.int32), 2: (torch.bfloat16, torch.int16)}  # by their bytes


def empty(
    kind: Quantisation, rows: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a (rows, columns) matrix, not yet set."""
    facts = QUANTISERS[kind]
    bits = SCALES[facts.scale_bytes][1]
    if facts.group == 0:
        of = torch.int8 if kind == "int8" else torch.uint8
        codes = torch.empty(rows, columns, dtype=of, device=device)
        return codes, torch.empty(rows, dtype=bits, device=device)
    groups = -(-rows * columns // facts.group)
    of = torch.int8 if kind == "int4" else torch.uint8
    codes = torch.empty(groups, facts.group // 2, dtype=of, device=device)
    return codes, torch.empty(groups, dtype=bits, device=device)


@torch.no_grad()
def quantised(weight: Tensor, kind: Quantisation) -> tuple[Tensor, Tensor]:
    """Codes and scales of `weight`, (rows, columns), computed in float32 on its own device, a piece
    at a time: see `WORKING`.

    Raises ValueError if a weight is not finite.
    """
    rows, columns = weight.shape
    size = QUANTISERS[kind].group or 1
    step = max(PIECE // columns, 1)
    step = -(-step // size) * size  # whole groups
    if rows <= step:
        return _quantised(weight, kind)
    codes, scales = empty(kind, rows, columns, weight.device)
    done = 0
    for start in range(0, rows, step):
        piece, factors = _quantised(weight[start : start + step], kind)
        codes[done : done + len(piece)] = piece
        scales[done : done + len(piece)] = factors
        done += len(piece)
    return codes, scales


def _quantised(weight: Tensor, kind: Quantisation) -> tuple[Tensor, Tensor]:
    facts = QUANTISERS[kind]
    groups = weight.float() if facts.group == 0 else _groups(weight.float(), facts.group)
    scales = _scales(groups, kind)
    if not scales.is_meta and not bool(scales.isfinite().all()):
        raise ValueError(f"weights that are not finite can't be quantised to {kind}")
    held, bits = SCALES[facts.scale_bytes]
    scales = scales.to(held)
    divisors = torch.where(scales == 0, 1, scales).float()[:, None]  # all weights are 0 there
    return _codes(groups / divisors, kind), scales.view(bits)


def dequantised(
    codes: Tensor,
    scales: Tensor,
    kind: Quantisation,
    shape: tuple[int, int],
    dtype: torch.dtype,
    levels: Tensor | None = None,
) -> Tensor:
    """The matrix of `shape` in `dtype`; `levels` are `nf4_levels` as bits, for that kind.

    A code and a product with its scale are rounded to `dtype` once each; codes of other kinds than
    nf4 are exact in all floating-point types.
    """
    facts = QUANTISERS[kind]
    factors = scales.view(SCALES[facts.scale_bytes][0]).float()[:, None]
    match kind:
        case "int8":
            values = codes.to(dtype)
        case "fp8":
            values = codes.view(torch.float8_e4m3fn).to(dtype)
        case "int4":
            pairs = torch.stack(((codes << 4) >> 4, codes >> 4), dim=-1)  # shifts keep the sign
            values = pairs.view(codes.shape[0], -1).to(dtype)
        case "nf4":
            assert levels is not None
            table = levels.view(torch.float32).to(dtype)
            values = torch.embedding(table, codes.int()).view(codes.shape[0], -1)
        case _:
            raise AssertionError(kind)
    values.mul_(factors)
    if facts.group == 0:
        return values
    count = shape[0] * shape[1]
    return values.view(-1)[:count].view(shape)


@cache
def normal_float() -> tuple[float, ...]:
    """The 16 levels of NormalFloat, ascending from -1 to 1 (arXiv 2305.14314, equation 4).

    Quantiles of the normal distribution, 8 below zero and 9 from zero up, evenly spaced in
    probability from 1/2 to the mean of 1 - 1/32 and 1 - 1/30 (appendix E), then divided by the
    largest.
    """
    furthest = 1 - (1 / 32 + 1 / 30) / 2

    def half(count: int) -> list[float]:
        """Positive quantiles of `count` probabilities above 1/2, the furthest first."""
        step = (furthest - 0.5) / count
        return [NormalDist().inv_cdf(furthest - step * number) for number in range(count)]

    found = sorted([*(-value for value in half(7)), 0.0, *half(8)])
    return tuple(value / found[-1] for value in found)


def nf4_levels(device: torch.device) -> Tensor:
    """The two levels of each byte of codes, (256, 2), as the bits of float32."""
    levels = normal_float()
    pairs = [(levels[byte & 15], levels[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.float32, device=device).view(torch.int32)


def _groups(weight: Tensor, size: int) -> Tensor:
    """(groups, size) in reading order, zeros behind the last weight."""
    flat = weight.reshape(-1)
    missing = -flat.numel() % size
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, size)


def _scales(groups: Tensor, kind: Quantisation) -> Tensor:
    """(groups,), float32. A negative one (int4) makes the furthest weight the lowest code."""
    if kind == "int4":
        furthest = groups.abs().argmax(dim=1, keepdim=True)
        return groups.gather(1, furthest)[:, 0] / -8
    return groups.abs().amax(dim=1) / EIGHT_BITS.get(kind, 1.0)


def _codes(scaled: Tensor, kind: Quantisation) -> Tensor:
    match kind:
        case "int8":
            return scaled.round_().clamp_(-128, 127).to(torch.int8)
        case "fp8":  # saturates nowhere: |scaled| is 448 at most, up to a rounding of the quotient
            return scaled.clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        case "int4":
            return _packed(scaled.round_().clamp_(-8, 7).to(torch.int8))
        case _:
            levels = torch.tensor(normal_float(), device=scaled.device)
            between = (levels[1:] + levels[:-1]) / 2
            return _packed(torch.bucketize(scaled, between, out_int32=True).to(torch.uint8))


def _packed(codes: Tensor) -> Tensor:
    """Two codes a byte, the first one in the lower half."""
    return (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
