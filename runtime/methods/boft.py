"""BOFT (Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", 2023,
arXiv 2311.06243): the weight becomes d W R with R a product of rotations of blocks of inputs.

Names and shapes are peft's, which reads the files. Its own layers multiply by the whole matrix R
and by permutations as matrices of that size too; here blocks of the input are rotated in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from compiler.plan import Adapter

NAME = "default"


def insert_boft(model: nn.Module, adapter: Adapter, targets: Sequence[str]) -> None:
    """Put a layer of this kind in the place of each module called in `targets`; only adapters then
    require gradients."""
    for name in targets:
        model.set_submodule(name, Boft(model.get_submodule(name), adapter))


class Boft(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """On a linear layer or a 1x1 convolution."""

    adapter_layer_names = ("boft_R", "boft_s")

    def __init__(self, base_layer: nn.Module, adapter: Adapter) -> None:
        """Starts as the base layer alone."""
        super().__init__()
        self.base_layer = base_layer
        self.is_convolution = isinstance(base_layer, nn.Conv2d)
        layer: Any = base_layer
        inputs = layer.in_channels if self.is_convolution else layer.in_features
        outputs = layer.out_channels if self.is_convolution else layer.out_features
        form = layer.weight
        size, factors = adapter.block_size, adapter.butterfly_factors
        shape = (factors, inputs // size, size, size)
        zeros = torch.zeros(shape, dtype=form.dtype, device=form.device)
        lengths = (1, outputs) if self.is_convolution else (outputs, 1)
        ones = torch.ones(lengths, dtype=form.dtype, device=form.device)
        self.boft_R = nn.ParameterDict({NAME: nn.Parameter(zeros)})
        self.boft_s = nn.ParameterDict({NAME: nn.Parameter(ones)})
        self.dropped = adapter.dropout
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def forward(self, input: Tensor) -> Tensor:
        """The layer's product with the rotated input, (..., inputs) or (B, inputs, H, W)."""
        if self._disable_adapters:
            plain: Tensor = self.base_layer(input)
            return plain
        blocks = rotations(self.boft_R[NAME])
        if self.training and self.dropped > 0:
            blocks = _left_out(blocks, self.dropped)
        blocks = blocks.to(input.dtype)
        lengths = self.boft_s[NAME].flatten()
        bias: Any = self.base_layer.bias
        if self.is_convolution:
            turned = butterfly(input.movedim(1, -1), blocks).movedim(-1, 1)
            lengths = lengths.view(-1, 1, 1)
            bias = None if bias is None else bias.view(-1, 1, 1)
        else:
            turned = butterfly(input, blocks)
        product: Tensor = self.base_layer(turned)
        if bias is not None:
            product = product - bias
        product = product * lengths
        return product if bias is None else product + bias


def rotations(numbers: Tensor) -> Tensor:
    """Cayley's (I - Q)(I + Q)^-1 of each block, with Q the skew-symmetric part; float32 at least.

    Takes and gives (factors, blocks, size, size).
    """
    held = numbers.float() if numbers.dtype in (torch.float16, torch.bfloat16) else numbers
    skew = (held - held.transpose(-1, -2)) / 2
    eye = torch.eye(held.shape[-1], dtype=held.dtype, device=held.device).expand_as(skew)
    turned: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return turned


def butterfly(x: Tensor, blocks: Tensor, *, transposed: bool = False) -> Tensor:
    """x R, or x R^T, of rows x (..., inputs), with R = F_m ... F_1 of m factors.

    A factor is P D P^T with D the blocks on a diagonal and P the permutation that brings inputs
    together which are 2^i half blocks apart.
    """
    factors, count, size, _ = blocks.shape
    numbers = range(factors) if transposed else reversed(range(factors))
    for number in numbers:
        step = blocks[number].transpose(-1, -2) if transposed else blocks[number]
        if number == 0:  # nothing changes places
            cut = x.reshape(*x.shape[:-1], count, size)
            x = torch.einsum("...bk,bkc->...bc", cut, step).flatten(-2)
            continue
        there, back = _order(count * size, size, number, x.device)
        cut = x[..., there].reshape(*x.shape[:-1], count, size)
        x = torch.einsum("...bk,bkc->...bc", cut, step).flatten(-2)[..., back]
    return x


@cache
def _order(inputs: int, size: int, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices that multiply rows by P and by P^T; kept, so that no step waits for a copy."""
    back = torch.tensor(permutation(inputs, size, number))
    return torch.argsort(back).to(device), back.to(device)


def permutation(inputs: int, size: int, number: int) -> list[int]:
    """For each row of the permutation matrix of a factor, the column that is one.

    Within groups of 2^number blocks, half blocks at even places come before those at odd ones.
    """
    half, group = size // 2, size * 2**number
    found: list[int] = []
    for start in range(0, inputs, group):
        pieces = list(range(start, start + group, half))
        for piece in pieces[0::2] + pieces[1::2]:
            found += range(piece, piece + half)
    return found


def _left_out(blocks: Tensor, share: float) -> Tensor:
    """Some blocks don't rotate, chosen at random; in the first factor as in the others."""
    count = blocks.shape[1]
    chosen = torch.randperm(count)[: int(share * count)].to(blocks.device)
    mask = torch.zeros(count, 1, 1, device=blocks.device, dtype=torch.bool)
    mask[chosen] = True
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.where(mask, eye, blocks)
