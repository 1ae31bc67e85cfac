"""Z-Image at run time. See `compiler.families.z_image` for the facts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compiler.families import z_image
from compiler.plan import Text
from runtime.families import common
from runtime.families.base import TextEmbedding
from runtime.families.masked_text import MASK, STATES, MaskedText
from runtime.families.posterior import PosteriorLatents


class ZImage(MaskedText, PosteriorLatents):
    """ZImagePipeline, ZImageTransformer2DModel, AutoencoderKL and Qwen3."""

    card = z_image.CARD
    text_channels = "cap_feat_dim"

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
        """See `Family.encode_with`: {"encoder_hidden_states": (tokens, channels)} each, without
        padding as the pipeline has them. Negative prompts are encoded like positive ones."""
        pipeline = common.stock_pipeline(self.card, parts)
        states = pipeline._encode_prompt(
            list(prompts),
            device=parts[encoder].device,
            max_sequence_length=text.max_length,
        )
        return [{STATES: each} for each in states]

    def predict(
        self, model: nn.Module, noisy: Tensor, sigmas: Tensor, text: Mapping[str, Tensor]
    ) -> Tensor:
        """See `Family.predict`. The time is 1 - sigma, rounded as in the pipeline, and the model's
        velocity points back. The model takes lists, each prompt without its padding."""
        transformer: Any = model
        states = text[STATES]
        lengths = _lengths(text[MASK])
        said: list[Tensor] = transformer(
            list(noisy.unsqueeze(2).unbind()),
            (1000 - sigmas * 1000) / 1000,
            [tokens[:count] for tokens, count in zip(states, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(said).squeeze(2)

    def denoise(
        self,
        parts: Mapping[str, Any],
        positive: TextEmbedding,
        negative: TextEmbedding,
        *,
        width: int,
        height: int,
        guidance: float,
        steps: int,
        seed: int,
    ) -> Tensor:
        """See `Family.denoise`. Bit-equal to `pipeline(prompt, ...)`."""
        pipeline = common.stock_pipeline(self.card, parts)
        transformer = pipeline.transformer
        both = [
            [each[STATES].to(transformer.device, transformer.dtype)]
            for each in (positive, negative)
        ]
        with common.inference(transformer):
            latents: Tensor = pipeline(
                prompt_embeds=both[0],
                negative_prompt_embeds=both[1],
                width=width,
                height=height,
                guidance_scale=guidance,
                # Guidance ends at no time, as by default; said so, nothing is looked up for it.
                cfg_truncation=math.inf,
                num_inference_steps=steps,
                generator=common.cpu_generator(seed),
                output_type="latent",
            ).images
        return latents


def _lengths(mask: Tensor) -> list[int]:
    """How many tokens each prompt of a mask (B, tokens) has. Without data (of meta tensors) all of
    them are of full length."""
    if mask.is_meta:
        return [mask.shape[1]] * mask.shape[0]
    counts: list[int] = mask.sum(1).tolist()
    return counts


FAMILY = ZImage()
