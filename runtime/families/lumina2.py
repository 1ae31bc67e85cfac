"""Lumina-Image 2.0 at run time. See `compiler.families.lumina2` for the facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_lumina2 import Lumina2RotaryPosEmbed
from torch import Tensor, nn

from compiler.families import lumina2
from compiler.plan import Model, Text
from runtime.families import common
from runtime.families.base import TextEmbedding
from runtime.families.masked_text import MASK, STATES, MaskedText
from runtime.families.posterior import PosteriorLatents


class Places(Lumina2RotaryPosEmbed):  # type: ignore[misc]
    """Diffusers' own places of tokens, which reads the lengths of prompts from their mask.

    A mask without data (of meta tensors) is that of prompts of full length. The tables lie on the
    model's device from the start.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Any:
        """See Diffusers' class."""
        if attention_mask.is_meta:
            attention_mask = torch.ones(attention_mask.shape, dtype=torch.int64, device="cpu")
        return super().forward(hidden_states, attention_mask)


def placed(transformer: Any, device: torch.device) -> Any:
    """`transformer` with `Places`; its tables are neither parameters nor buffers, so that whoever
    builds it without weights leaves them without data."""
    config = transformer.config
    with torch.device(device):
        transformer.rope_embedder = Places(
            theta=10000,
            axes_dim=config.axes_dim_rope,
            axes_lens=config.axes_lens,
            patch_size=config.patch_size,
        )
    return transformer


class Lumina2(MaskedText, PosteriorLatents):
    """Lumina2Pipeline, Lumina2Transformer2DModel, AutoencoderKL and Gemma-2."""

    card = lumina2.CARD
    text_channels = "cap_feat_dim"

    def load(
        self, model: Model, name: str, dtype: torch.dtype, device: torch.device, *, seed: int = 0
    ) -> Any:
        """See `Family.load`."""
        part = common.load_component(model, name, dtype, device, seed=seed)
        return placed(part, device) if name == model.trained_component else part

    def empty(self, model: Model, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """See `Family.empty`."""
        part = common.empty_component(model, name, dtype, device)
        if name == model.trained_component:
            placed(part, device)
        return part

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

        Padding is cut off: the model takes the tokens that the mask shows, no others. Negative
        prompts have no system prompt before them.
        """
        pipeline = common.stock_pipeline(self.card, parts)
        given = {"device": parts[encoder].device, "max_sequence_length": text.max_length}
        if negative or not text.instruction:
            states, mask = pipeline._get_gemma_prompt_embeds(list(prompts), **given)
        else:
            states, mask, _, _ = pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                system_prompt="\n".join(text.instruction),
                **given,
            )
        return [{STATES: s[m.bool()]} for s, m in zip(states, mask, strict=True)]

    def predict(
        self, model: nn.Module, noisy: Tensor, sigmas: Tensor, text: Mapping[str, Tensor]
    ) -> Tensor:
        """See `Family.predict`. The time is 1 - sigma, and the model's velocity points back."""
        prediction: Tensor = model(
            hidden_states=noisy,
            timestep=1 - sigmas,
            encoder_hidden_states=text[STATES],
            encoder_attention_mask=text[MASK],
            return_dict=False,
        )[0]
        return -prediction

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
        transformer = pipeline.transformer
        with common.inference(transformer):
            latents: Tensor = pipeline(
                **self.prompts(positive, negative, transformer),
                width=width,
                height=height,
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=common.cpu_generator(seed),
                output_type="latent",
            ).images
        return latents


FAMILY = Lumina2()
