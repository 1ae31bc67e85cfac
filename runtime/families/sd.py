"""Stable Diffusion 1 and 2 at run time. See `compiler.families.sd` for the facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compiler.families import sd
from compiler.plan import Model, Text
from runtime.batch import Batch
from runtime.families import common
from runtime.families.base import TextEmbedding
from runtime.families.clip import Configs, Shares, last_states
from runtime.families.unet import UNetFamily

STATES = "encoder_hidden_states"


class StableDiffusion(UNetFamily):
    """StableDiffusionPipeline, UNet2DConditionModel, AutoencoderKL and CLIP."""

    card = sd.CARD

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
        """See `Family.encode_with`: states (77, channels) each, padding kept as in inference.

        Negative prompts are encoded like positive ones.
        """
        pipeline = common.stock_pipeline(self.card, parts)
        states, _ = pipeline.encode_prompt(
            list(prompts),
            device=parts[encoder].device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return [{STATES: each} for each in states]

    def join_text(self, shares: Mapping[str, TextEmbedding]) -> TextEmbedding:
        """See `Family.join_text`; there is one encoder."""
        (share,) = shares.values()
        return share

    def collate_text(self, embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
        """See `Family.collate_text`. All prompts are of one length."""
        return {STATES: torch.stack([each[STATES] for each in embeddings])}

    def encode_tokens(self, encoder: str, module: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
        """See `TrainsText.encode_tokens`."""
        return {STATES: last_states(module, tokens)}

    def with_shares(
        self, text: Mapping[str, Tensor], shares: Shares, configs: Configs
    ) -> dict[str, Tensor]:
        """See `TrainsText.with_shares`: all of it is the one encoder's."""
        (share,) = shares.values()
        return {**text, **share}

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
        channels = common.config_of(model, "unet")["cross_attention_dim"]
        states = torch.zeros(batch_size, text.max_length, channels, device=device)
        return self._example(model, width, height, batch_size, {STATES: states}, device)

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
        unet = pipeline.unet
        both = [each[STATES][None].to(unet.device, unet.dtype) for each in (positive, negative)]
        with common.inference(unet):
            latents: Tensor = pipeline(
                prompt_embeds=both[0],
                negative_prompt_embeds=both[1],
                width=width,
                height=height,
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=common.cpu_generator(seed),
                output_type="latent",
            ).images
        return latents


FAMILY = StableDiffusion()
