"""What one forward pass is given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import evolve, field, frozen
from torch import Tensor


@frozen(kw_only=True)
class Tokens:
    """Prompts as the numbers of their tokens, for text encoders that are trained."""

    numbers: Mapping[str, Tensor]  # encoder -> (B, tokens) int64
    blank: Tensor | None = None  # (B,) bool: samples whose embedding is zeros; None: none is

    def part(self, start: int, end: int) -> Tokens:
        """Those of the samples from `start` up to `end`: views."""
        return Tokens(
            numbers={name: each[start:end] for name, each in self.numbers.items()},
            blank=None if self.blank is None else self.blank[start:end],
        )

    def to(self, device: torch.device) -> Tokens:
        """The same on `device`."""
        return Tokens(
            numbers={name: each.to(device) for name, each in self.numbers.items()},
            blank=None if self.blank is None else self.blank.to(device),
        )


@frozen(kw_only=True)
class Batch:
    """One batch of one bucket. All tensors live on the training device.

    `latents` are scaled as the family states (unit variance); `sigmas` are the noise levels in
    (0, 1], already shifted, or places in a table of noise levels (`runtime.noise_table`); `text`
    holds what `Family.predict` takes, padded to the batch's longest prompt.
    """

    latents: Tensor  # (B, C, h, w) float32
    noise: Tensor  # (B, C, h, w) float32
    sigmas: Tensor  # (B,) float32
    text: Mapping[str, Tensor]
    kept: Tensor | None = None  # (B,) float32, abar at these places; None: in flow matching
    weights: Tensor | None = None  # (B,) float32, per-sample loss weights; None: all 1
    mask: Tensor | None = None  # (B, 1, h, w) float32, weights of places, mean 1; None: all 1
    keeps_base: bool = False  # learn what the base predicts without adapter, not the velocity
    draws: Mapping[str, Tensor] = field(factory=dict)  # (B, ...) each, of a method's own
    tokens: Tokens | None = None  # where text encoders are trained

    def parts(self, size: int) -> list[Batch]:
        """The batch in parts of at most `size` samples (0: whole), each a view of it."""
        count = self.latents.shape[0]
        if size == 0 or size >= count:
            return [self]
        return [
            Batch(
                latents=self.latents[start : start + size],
                noise=self.noise[start : start + size],
                sigmas=self.sigmas[start : start + size],
                kept=None if self.kept is None else self.kept[start : start + size],
                text={name: tensor[start : start + size] for name, tensor in self.text.items()},
                weights=None if self.weights is None else self.weights[start : start + size],
                mask=None if self.mask is None else self.mask[start : start + size],
                keeps_base=self.keeps_base,
                draws={name: each[start : start + size] for name, each in self.draws.items()},
                tokens=None if self.tokens is None else self.tokens.part(start, start + size),
            )
            for start in range(0, count, size)
        ]


def masked(batch: Batch) -> Batch:
    """`batch` with a mask that shows all, for simulation and measurement."""
    return evolve(batch, mask=batch.latents.new_ones(batch.latents[:, :1].shape))
