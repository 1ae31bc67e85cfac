"""Sana at run time. See `compiler.families.sana` for the facts and their sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compiler.families import sana
from compiler.plan import Model, Text
from runtime.batch import Batch
from runtime.families import common
from runtime.families.base import TextEmbedding


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
        encoder_hidden_states=text["encoder_hidden_states"],
        encoder_attention_mask=text["encoder_attention_mask"],
        timestep=times,
        guidance=guidance,
        return_dict=False,
    )[0]
    return prediction


class Sana(common.Stock):
    """SanaPipeline, SanaTransformer2DModel, AutoencoderDC and Gemma-2."""

    card = sana.CARD

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
        return [{"encoder_hidden_states": s[m.bool()]} for s, m in zip(states, mask, strict=True)]

    def join_text(self, shares: Mapping[str, TextEmbedding]) -> TextEmbedding:
        """See `Family.join_text`; there is one encoder."""
        (share,) = shares.values()
        return share

    def collate_text(self, embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
        """See `Family.collate_text`: states (B, tokens, channels), mask (B, tokens) of 0 and 1."""
        longest = max(e["encoder_hidden_states"].shape[0] for e in embeddings)
        return self._padded(embeddings, longest)

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
        config = common.config_of(model, "transformer")
        factor = self.card.vae_factor(common.config_of(model, "vae"))
        shape = (batch_size, config["in_channels"], height // factor, width // factor)
        tokens = (batch_size, text.max_length)
        return Batch(
            latents=torch.zeros(shape, device=device),
            noise=torch.zeros(shape, device=device),
            sigmas=torch.full((batch_size,), 0.5, device=device),
            text={
                "encoder_hidden_states": torch.zeros(
                    *tokens, config["caption_channels"], device=device
                ),
                "encoder_attention_mask": torch.ones(tokens, dtype=torch.int64, device=device),
            },
        )

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
                **self._prompt(positive, negative, pipeline.transformer),
            ).images
        return latents

    def decode(self, parts: Mapping[str, Any], latents: Tensor) -> Tensor:
        """See `Family.decode`."""
        vae = parts["vae"]
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor
        pixels: Tensor = vae.decode(scaled, return_dict=False)[0]
        return pixels

    def _prompt(
        self, positive: TextEmbedding, negative: TextEmbedding, transformer: Any
    ) -> dict[str, Tensor]:
        """Padded as the pipeline pads, so that equal inputs run equal kernels."""
        lengths = [e["encoder_hidden_states"].shape[0] for e in (positive, negative)]
        both = self._padded([positive, negative], max(self.card.prompt_length, *lengths))
        states = both["encoder_hidden_states"].to(transformer.device, transformer.dtype)
        mask = both["encoder_attention_mask"].to(transformer.device)
        return {
            "prompt_embeds": states[:1],
            "prompt_attention_mask": mask[:1],
            "negative_prompt_embeds": states[1:],
            "negative_prompt_attention_mask": mask[1:],
        }

    def _padded(self, embeddings: Sequence[TextEmbedding], length: int) -> dict[str, Tensor]:
        states = [e["encoder_hidden_states"] for e in embeddings]
        positions = torch.arange(length, device=states[0].device)
        counts = torch.tensor([s.shape[0] for s in states], device=states[0].device)
        return {
            "encoder_hidden_states": common.pad_tokens(states, length),
            "encoder_attention_mask": (positions < counts[:, None]).long(),
        }


FAMILY = Sana()
