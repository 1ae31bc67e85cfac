"""Text of the families with one encoder, whose padding the model is told by a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compiler.families.card import FamilyCard
from compiler.plan import Model, Text
from runtime.batch import Batch
from runtime.families import common
from runtime.families.base import TextEmbedding

STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"


class OneEncoder:
    """One text encoder, whose states are the whole embedding."""

    def join_text(self, shares: Mapping[str, TextEmbedding]) -> TextEmbedding:
        """See `Family.join_text`; there is one encoder."""
        (share,) = shares.values()
        return share


class MaskedText(OneEncoder):
    """{"encoder_hidden_states": (tokens, channels)} for each prompt, "encoder_attention_mask"
    beside them in a batch."""

    card: FamilyCard
    text_channels: str  # in the trained component's configuration: how many

    def collate_text(self, embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
        """See `Family.collate_text`: states (B, tokens, channels), mask (B, tokens) of 0 and 1."""
        return common.padded(embeddings, STATES, MASK)

    def example_batch(
        self,
        model: Model,
        width: int,
        height: int,
        batch_size: int,
        text: Text,
        device: torch.device,
    ) -> Batch:
        """See `Family.example_batch`."""
        config = common.config_of(model, self.card.trained_component)
        tokens = (batch_size, text.max_length)
        told = {
            STATES: torch.zeros(*tokens, config[self.text_channels], device=device),
            MASK: torch.ones(tokens, dtype=torch.int64, device=device),
        }
        return common.zeros(self.card, model, (width, height), batch_size, told, device)

    def prompts(
        self, positive: TextEmbedding, negative: TextEmbedding, transformer: Any
    ) -> dict[str, Tensor]:
        """Both as the stock pipeline takes them, padded as it pads, so that equal inputs run equal
        kernels."""
        both = common.padded([positive, negative], STATES, MASK, self.card.prompt_length)
        states = both[STATES].to(transformer.device, transformer.dtype)
        mask = both[MASK].to(transformer.device)
        return {
            "prompt_embeds": states[:1],
            "prompt_attention_mask": mask[:1],
            "negative_prompt_embeds": states[1:],
            "negative_prompt_attention_mask": mask[1:],
        }
