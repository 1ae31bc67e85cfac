"""Flux.2 dev at run time. See `compiler.families.flux2_dev` for the facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compiler.families import flux2_dev
from runtime.families.base import TextEmbedding
from runtime.families.flux import unpacked
from runtime.families.flux2 import Flux2Klein, factor_of, statistics


class Flux2Dev(Flux2Klein):
    """Flux2Pipeline, Flux2Transformer2DModel, AutoencoderKLFlux2 and Mistral Small 3.

    It draws without a second pass for a negative prompt; the transformer is told the guidance.
    """

    card = flux2_dev.CARD

    def denoise(
        self,
        parts: Mapping[str, Any],
        positive: TextEmbedding,
        negative: TextEmbedding,
        *,
        width: int,
        height: int,
        **options: Any,
    ) -> Tensor:
        """See `Flux2Klein.denoise`. This pipeline gives tokens, and leaves them normalised."""
        tokens = super().denoise(parts, positive, negative, width=width, height=height, **options)
        mean, deviation = statistics(parts["vae"], tokens)
        factor = factor_of(parts["vae"])
        return unpacked(tokens * deviation + mean, height // factor, width // factor)


FAMILY = Flux2Dev()
