"""Kolors at run time. See `compiler.families.kolors` for the facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compiler.families import kolors
from compiler.plan import Text
from runtime.families import common
from runtime.families.base import TextEmbedding
from runtime.families.sized_unet import POOLED, STATES, SizedUNet


class Kolors(SizedUNet):
    """KolorsPipeline, UNet2DConditionModel, AutoencoderKL and ChatGLM."""

    card = kolors.CARD

    @torch.no_grad()
    def encode_with(
        self,
        encoder: str,
        parts: Mapping[str, Any],
        prompts: Sequence[str],
        text: Text,
        *,
        negative: bool = False,
    ) -> list[TextEmbedding]:
        """See `Family.encode_with`: states (tokens, channels) of the last layer but one, padding
        before the prompt kept as in inference, and the last token's state (channels,).

        Negative prompts are encoded like positive ones.
        """
        pipeline = common.stock_pipeline(self.card, parts)
        states, _, pooled, _ = pipeline.encode_prompt(
            list(prompts),
            device=parts[encoder].device,
            do_classifier_free_guidance=False,
            max_sequence_length=text.max_length,
        )
        both = zip(states, pooled, strict=True)
        return [{STATES: one, POOLED: other} for one, other in both]


FAMILY = Kolors()
