"""CLIP text encoders that are trained: their numbers from token numbers, with gradients.

What a family's stock pipeline does of a prompt by a CLIP is repeated here on token numbers, without
leaving autograd. Bit-equal to `Family.encode_with` where the batch is as large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Configs = Mapping[str, Mapping[str, Any]]
Shares = Mapping[str, Mapping[str, Tensor]]  # encoder -> its part of the text, (B, ...) each


@runtime_checkable
class TrainsText(Protocol):
    """A family some of whose text encoders may be trained (`FamilyCard.trainable_encoders`)."""

    def encode_tokens(self, encoder: str, module: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
        """The share of `encoder`, as `Family.encode_with` gives it, of prompts that are given as
        token numbers (B, tokens): (B, ...) each, with gradients."""
        ...

    def with_shares(
        self, text: Mapping[str, Tensor], shares: Shares, configs: Configs
    ) -> dict[str, Tensor]:
        """A batch's `text` with `shares` in the place of what those encoders gave before.

        `configs` are those of the encoders, by component name.
        """
        ...


def last_states(module: nn.Module, tokens: Tensor) -> Tensor:
    """States of the last layer, normalised: (B, tokens, channels)."""
    encoder: Any = module
    states: Tensor = encoder(tokens)[0]
    return states


def inner_states(module: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """States of the last layer but one (B, tokens, channels), and the model's first output: the
    projection (B, channels) of one that projects, else the last layer's states."""
    encoder: Any = module
    found = encoder(tokens, output_hidden_states=True)
    return found.hidden_states[-2], found[0]


def end_state(module: nn.Module, tokens: Tensor) -> Tensor:
    """The state at the end of each prompt, (B, channels)."""
    encoder: Any = module
    found: Tensor = encoder(tokens, output_hidden_states=False).pooler_output
    return found


def replaced(whole: Tensor, part: Tensor, start: int, dim: int = -1) -> Tensor:
    """`whole` with `part` in the place of what begins at `start` along `dim`."""
    end = start + part.shape[dim]
    pieces = [
        whole.narrow(dim, 0, start),
        part.to(whole.device),
        whole.narrow(dim, end, whole.shape[dim] - end),
    ]
    return torch.cat([piece for piece in pieces if piece.shape[dim]], dim=dim)
