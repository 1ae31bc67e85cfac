"""Sana at run time. See `compiler.families.sana` for the facts and their sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compiler.families import sana
from compiler.plan import Text
from runtime.families import common
from runtime.families.base import TextEmbedding
from runtime.families.masked_text import MASK, STATES, MaskedText


def velocity(
    model: nn.Module,
    noisy: Tensor,
    times: Tensor,
    text: Mapping[str, Tensor],
    guidance: Tensor | None = None,
) -> Tensor:
    """The network's output for `noisy` (B, C, h, w) at `times` (B,), as it takes them itself.

    `guidance` (B,) is what a distilled network is told of it, None for any other.
    """
    transformer: Any = model
    prediction: Tensor = transformer(
        hidden_states=noisy,
        encoder_hidden_states=text[STATES],
        encoder_attention_mask=text[MASK],
        timestep=times,
        guidance=guidance,
        return_dict=False,
    )[0]
    return prediction


class Sana(MaskedText, common.Stock):
    """SanaPipeline, SanaTransformer2DModel, AutoencoderDC and Gemma-2."""

    card = sana.CARD
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
        """
        pipeline = common.stock_pipeline(self.card, parts)
        states, mask, _, _ = pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=parts["text_encoder"].device,
            max_sequence_length=text.max_length,
            complex_human_instruction=None if negative else list(text.instruction) or None,
        )
        return [{STATES: s[m.bool()]} for s, m in zip(states, mask, strict=True)]

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        """See `Family.encode_pixels`: {"mean"}; the autoencoder is deterministic."""
        codec: Any = vae
        with torch.no_grad():
            return {"mean": codec.encode(pixels.to(codec.dtype)).latent.float()}

    def latents(
        self, cached: Mapping[str, Tensor], vae_config: Mapping[str, Any], noise: Tensor | None
    ) -> Tensor:
        """See `Family.latents`. `noise` has no effect: there is no posterior to draw from."""
        return cached["mean"].float() * float(vae_config["scaling_factor"])

    def predict(
        self, model: nn.Module, noisy: Tensor, sigmas: Tensor, text: Mapping[str, Tensor]
    ) -> Tensor:
        """See `Family.predict`. The time is 1000 sigma, scaled as the pipeline scales it."""
        transformer: Any = model
        return velocity(model, noisy, sigmas * 1000 * transformer.config.timestep_scale, text)

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
        """See `Family.denoise`. Bit-equal to `pipeline(prompt, ...)` at the stock prompt length."""
        pipeline = common.stock_pipeline(self.card, parts)
        with common.inference(parts["transformer"]):
            latents: Tensor = pipeline(
                prompt=None,
                negative_prompt=None,
                width=width,
                height=height,
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=common.cpu_generator(seed),
                use_resolution_binning=False,
                output_type="latent",
                **self.prompts(positive, negative, pipeline.transformer),
            ).images
        return latents

    def decode(self, parts: Mapping[str, Any], latents: Tensor) -> Tensor:
        """See `Family.decode`."""
        vae = parts["vae"]
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor
        pixels: Tensor = vae.decode(scaled, return_dict=False)[0]
        return pixels


FAMILY = Sana()
