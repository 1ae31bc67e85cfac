"""PixArt-Sigma at run time. See `compiler.families.pixart` for the facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from compiler.families import pixart
from compiler.plan import Model, Text
from runtime.batch import Batch
from runtime.families import common
from runtime.families.base import TextEmbedding
from runtime.families.masked_text import MASK, STATES, MaskedText
from runtime.families.posterior import PosteriorLatents
from runtime.noise_table import timesteps

UNTOLD = {"resolution": None, "aspect_ratio": None}  # sizes, which PixArt-Sigma is not told


class PixArtSigma(MaskedText, PosteriorLatents):
    """PixArtSigmaPipeline, PixArtTransformer2DModel, AutoencoderKL and T5."""

    card = pixart.CARD
    text_channels = "caption_channels"

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
        """See `Family.encode_with`: {"encoder_hidden_states": (tokens, channels)} each.

        Padding is cut off: it is masked with -10000 before the softmax, whose weight is exactly 0.
        Negative prompts are encoded like positive ones.
        """
        pipeline = common.stock_pipeline(self.card, parts)
        states, mask, _, _ = pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=parts[encoder].device,
            max_sequence_length=text.max_length,
        )
        return [{STATES: s[m.bool()]} for s, m in zip(states, mask, strict=True)]

    def predict(
        self, model: nn.Module, noisy: Tensor, sigmas: Tensor, text: Mapping[str, Tensor]
    ) -> Tensor:
        """See `Family.predict`: the noise, without the variance that comes behind it."""
        transformer: Any = model
        prediction: Tensor = transformer(
            hidden_states=noisy,
            timestep=timesteps(sigmas),
            encoder_hidden_states=text[STATES],
            encoder_attention_mask=text[MASK],
            added_cond_kwargs=UNTOLD,
            return_dict=False,
        )[0]
        return prediction[:, : noisy.shape[1]]

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
        batch = super().example_batch(model, width, height, batch_size, text, device)
        return evolve(batch, kept=torch.full((batch_size,), 0.5, device=device))

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
        """See `Family.denoise`. Bit-equal to `pipeline(prompt, ...)` at the stock prompt length,
        without resolution binning and without cleaning of captions."""
        pipeline = common.stock_pipeline(self.card, parts)
        transformer = pipeline.transformer
        with common.inference(transformer):
            latents: Tensor = pipeline(
                prompt=None,
                negative_prompt=None,
                **self.prompts(positive, negative, transformer),
                width=width,
                height=height,
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=common.cpu_generator(seed),
                use_resolution_binning=False,
                clean_caption=False,
                output_type="latent",
            ).images
        return latents


FAMILY = PixArtSigma()
