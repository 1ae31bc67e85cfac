"""What one forward pass is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from attrs import evolve, field, frozen
from torch import Tensor


@frozen(kw_only=True)
class Tokens:
    """Prompts as the numbers of their tokens, for text encoders that are trained."""

    numbers: Mapping[str, Tensor]  # encoder -> (B, tokens) int64
    blank: Tensor | None = None  # (B,) bool: samples whose embedding is zeros; None: none is

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """The same with `change` made to each tensor."""
        return Tokens(
            numbers={name: change(each) for name, each in self.numbers.items()},
            blank=None if self.blank is None else change(self.blank),
        )

    def to(self, device: torch.device) -> Tokens:
        """The same on `device`."""
        return self.mapped(lambda each: each.to(device))


@frozen(kw_only=True)
class Batch:
    """One batch of one bucket. In a step all tensors live on the training device.

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
            self.mapped(lambda tensor, start=start: tensor[start : start + size])  # type: ignore[misc]
            for start in range(0, count, size)
        ]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with `change` made to each tensor."""
        return Batch(
            latents=change(self.latents),
            noise=change(self.noise),
            sigmas=change(self.sigmas),
            text={name: change(each) for name, each in self.text.items()},
            kept=None if self.kept is None else change(self.kept),
            weights=None if self.weights is None else change(self.weights),
            mask=None if self.mask is None else change(self.mask),
            keeps_base=self.keeps_base,
            draws={name: change(each) for name, each in self.draws.items()},
            tokens=None if self.tokens is None else self.tokens.mapped(change),
        )


def masked(batch: Batch) -> Batch:
    """`batch` with a mask that shows all, for simulation and measurement."""
    return evolve(batch, mask=batch.latents.new_ones(batch.latents[:, :1].shape))
