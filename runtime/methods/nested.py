"""DyLoRA: a LoRA whose first ranks are one by themselves (Valipour et al., "DyLoRA: Parameter
Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation", 2022, arXiv
2210.07558).

A step draws a rank b. Of A it has the first b rows and of B the first b columns, scaled by the s
that a LoRA of rank b would have (equation 6), and it trains the last block of them alone; those
before it are as they were (the paper's "frozen" mode, equation 8, and what LyCORIS and sd-scripts
do). b is uniform over the multiples of the block size. It is one for all layers, as in the paper's
algorithm 1, so that every rank that the file may be cut to has been trained whole; LyCORIS draws
for each layer. s is alpha / b, as in the paper, and is therefore that of the file cut to rank b;
LyCORIS divides by the number of blocks, which is b where blocks are of one rank.

The optimizer is given zeros for what a step does not train, as in the paper's own code, so that its
averages go on: with momentum those ranks move a little too.

Ranks that a step has not are multiplied by zero, so that all steps have the same shapes: they cost
as much as those of a LoRA. Out of training the layers are those of a LoRA of the whole rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.nn import functional

from compiler.plan import Adapter
from runtime import rng

NAME = "default"


@define(eq=False)
class Level:
    """What layers of one rank have of it in a step."""

    rank: int
    shares: Tensor | None = None  # (rank,) float32, s of the step over that of the whole rank, or 0
    newest: Tensor | None = None  # (rank,) bool, those that the step trains

    def set(self, first: int, end: int, share: float, device: torch.device) -> None:
        """Ranks up to `end`, of which those from `first` on are trained. Waits for nothing."""
        if self.shares is None or self.newest is None or self.shares.device != device:
            self.shares = torch.empty(self.rank, dtype=torch.float32, device=device)
            self.newest = torch.empty(self.rank, dtype=torch.bool, device=device)
        self.shares.zero_()[:end].fill_(share)
        self.newest.zero_()[first:end].fill_(True)


@define(eq=False)
class Nested:
    """The layers of one model, and the rank that they have in a step."""

    block_size: int
    rooted: bool  # s divides by the root of the rank
    _levels: dict[int, Level] = field(factory=dict)
    _of: nn.Parameter | None = None  # where the layers compute

    def begin(self, seed: int, step: int) -> None:
        """Draw the rank of the update after `step` others: a function of (seed, step), the same in
        all processes, for all passes of the update and for what is recomputed in them."""
        assert self._of is not None, "there are targets"
        drawn = rng.uniform(seed, "dylora", step)
        for rank, level in self._levels.items():
            first = int(drawn * (rank // self.block_size)) * self.block_size
            end = first + self.block_size
            share = (rank / end) ** 0.5 if self.rooted else rank / end
            level.set(first, end, share, self._of.device)

    def take(self, layer: Any) -> None:
        """Let a LoRA layer of peft's have its rank of the step."""
        a, b = layer.lora_A[NAME], layer.lora_B[NAME]
        a.__class__, b.__class__ = OF[type(a)]
        rank = a.weight.shape[0]
        a.level = b.level = self._levels.setdefault(rank, Level(rank))
        self._of = self._of if self._of is not None else a.weight


def nest(model: nn.Module, adapter: Adapter, targets: Sequence[str]) -> Nested:
    """Make of peft's LoRA layers at `targets` such of DyLoRA."""
    found = Nested(adapter.block_size, adapter.scaling == "sqrt-rank")
    for name in targets:
        found.take(model.get_submodule(name))
    return found


class _Part:
    """Mixed into one of the two matrices of a LoRA."""

    level: Level
    weight: nn.Parameter
    training: bool

    def trained(self, column: bool) -> Tensor:
        """The weight, of whose rows (or columns) the newest alone have a gradient."""
        newest, weight = self.level.newest, self.weight
        assert newest is not None, "the step has begun"
        beyond = weight.ndim - 1 - column
        mask = newest.view(*[1] * column, -1, *[1] * beyond)
        return torch.where(mask, weight, weight.detach())


class _Down(_Part):
    """A (rank, inputs). Its rows that the step has not come to columns of B that are zero."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if not self.training:
            whole: Tensor = super().forward(input)  # type: ignore[misc]
            return whole
        return _applied(self, input, self.trained(column=False))


class _Up(_Part):
    """B (outputs, rank), with the step's share of the scale: peft multiplies by the whole's."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if not self.training:
            whole: Tensor = super().forward(input)  # type: ignore[misc]
            return whole
        weight = self.trained(column=True)
        shares = self.level.shares.view(-1, *[1] * (weight.ndim - 2))
        return _applied(self, input, (weight * shares).to(weight.dtype))


def _applied(layer: Any, input: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        found: Tensor = layer._conv_forward(input, weight, layer.bias)
        return found
    return functional.linear(input, weight, layer.bias)


class _DownLinear(_Down, nn.Linear): ...  # type: ignore[misc]


class _UpLinear(_Up, nn.Linear): ...  # type: ignore[misc]


class _DownConv2d(_Down, nn.Conv2d): ...  # type: ignore[misc]


class _UpConv2d(_Up, nn.Conv2d): ...  # type: ignore[misc]


OF: dict[type, tuple[type, type]] = {
    nn.Linear: (_DownLinear, _UpLinear),
    nn.Conv2d: (_DownConv2d, _UpConv2d),
}
