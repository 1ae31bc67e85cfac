"""T-LoRA: a LoRA of less rank the more noise there is (Soboleva et al., "T-LoRA: Single Image
Diffusion Model Customization Without Overfitting", 2025, arXiv 2507.05964).

At time t of T a sample has the first floor((R - r) (T - t) / T) + r of the R ranks, r the least, so
that little is learned where there is most noise and a layout is soon learned by heart. The time is
what the model is told, in training, measuring and drawing alike; each sample of a batch has its own
rank. What reads the file knows nothing of it and has all ranks at all times.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from compiler.families.card import FamilyCard
from compiler.plan import Adapter

NAME = "default"
TIMES = ("timestep", "t")  # how Diffusers' models call the time


@define(eq=False)
class Mask:
    """Which ranks layers of `rank` have in a pass."""

    rank: int
    shown: Tensor | None = None  # (B, rank) bool; (1, rank) where all samples have one time


@define(eq=False)
class ByNoise:
    """Called before each pass of the model: sets the ranks by the time that the model is told."""

    card: FamilyCard
    least: int
    name: str  # of the argument that is the time
    position: int  # of it among all
    masks: dict[int, Mask] = field(factory=dict)

    def __call__(self, model: nn.Module, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        """See torch's `register_forward_pre_hook`."""
        told = named[self.name] if self.name in named else given[self.position]
        clean, span = cleanness(self.card, model, torch.as_tensor(told).reshape(-1).float())
        for mask in self.masks.values():
            grown = (clean * (mask.rank - self.least) / span).floor() + self.least
            mask.shown = torch.arange(mask.rank, device=clean.device) < grown[:, None]


def cleanness(card: FamilyCard, model: Any, times: Tensor) -> tuple[Tensor, float]:
    """T - t (B,) float32 and T, of times as the model takes them."""
    if card.prediction != "flow":
        return (card.timesteps - times).clamp(0, card.timesteps), card.timesteps
    if card.time == "1 - sigma":
        return times.clamp(0, 1), 1
    span = 1000 * getattr(model.config, "timestep_scale", 1.0) if card.time == "1000 sigma" else 1
    return (span - times).clamp(0, span), span


def mask_by_noise(
    model: nn.Module, adapter: Adapter, targets: Sequence[str], card: FamilyCard
) -> None:
    """Make of peft's LoRA layers at `targets` such of T-LoRA."""
    arguments = list(inspect.signature(model.forward).parameters)
    name = next(name for name in TIMES if name in arguments)
    by_noise = ByNoise(card, adapter.min_rank, name, arguments.index(name))
    for name in targets:
        layer: Any = model.get_submodule(name)
        a = layer.lora_A[NAME]
        a.__class__ = OF[type(a)]
        rank = a.weight.shape[0]
        a.mask = by_noise.masks.setdefault(rank, Mask(rank))
    model.register_forward_pre_hook(by_noise, with_kwargs=True)


class _Masked:
    """Mixed into the first matrix of a LoRA: its outputs beyond the rank of a sample are zero."""

    mask: Mask

    def forward(self: Any, input: Tensor) -> Tensor:
        found: Tensor = super().forward(input)  # type: ignore[misc]
        shown: Tensor | None = self.mask.shown
        assert shown is not None and shown.shape[0] in (1, found.shape[0]), "samples come first"
        pixels = isinstance(self, nn.Conv2d)
        ones = [1] * (found.ndim - 2)
        shape = (*shown.shape, *ones) if pixels else (shown.shape[0], *ones, shown.shape[1])
        return found * shown.view(shape).to(found.dtype)


class _MaskedLinear(_Masked, nn.Linear): ...


class _MaskedConv2d(_Masked, nn.Conv2d): ...


OF: dict[type, type] = {nn.Linear: _MaskedLinear, nn.Conv2d: _MaskedConv2d}
