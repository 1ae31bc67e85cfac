"""Stable Diffusion 3 and 3.5 at run time. See `compiler.families.sd3` for the facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compiler.families import sd3
from compiler.plan import Model, Text
from runtime.batch import Batch
from runtime.families import common
from runtime.families.base import TextEmbedding

T5 = "text_encoder_3"


class StableDiffusion3(common.Stock):
    """StableDiffusion3Pipeline, SD3Transformer2DModel, AutoencoderKL, two CLIPs and T5."""

    card = sd3.CARD

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
        """See `Family.encode_with`: states (tokens, channels) each, CLIP's with pooled (channels,).

        There is no mask: padding positions are inputs like others, so all of them are kept.
        Negative prompts are encoded like positive ones.
        """
        pipeline = common.stock_pipeline(self.card, parts)
        device = parts[encoder].device
        if encoder == T5:
            states = pipeline._get_t5_prompt_embeds(
                list(prompts),
                max_sequence_length=text.max_length,
                device=device,
                dtype=parts[encoder].dtype,
            )
            return [{"states": each} for each in states]
        states, pooled = _clip(pipeline, encoder, list(prompts), device)
        return [{"states": s, "pooled": p} for s, p in zip(states, pooled, strict=True)]

    def join_text(self, shares: Mapping[str, TextEmbedding]) -> TextEmbedding:
        """See `Family.join_text`: states (77 + length, channels) and pooled (channels,).

        As `encode_prompt` joins them: both CLIPs' channels side by side, filled up with zeros to
        T5's, then T5's tokens behind.
        """
        first, second, t5 = (shares[name] for name in self.card.text_encoders)
        clip = torch.cat([first["states"], second["states"]], dim=-1)
        short = t5["states"].shape[-1] - clip.shape[-1]
        states = [nn.functional.pad(clip, (0, short)), t5["states"]]
        return {
            "encoder_hidden_states": torch.cat(states, dim=-2),
            "pooled_projections": torch.cat([first["pooled"], second["pooled"]], dim=-1),
        }

    def collate_text(self, embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
        """See `Family.collate_text`. All prompts are of one length."""
        keys = ("encoder_hidden_states", "pooled_projections")
        return {key: torch.stack([e[key] for e in embeddings]) for key in keys}

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        """See `Family.encode_pixels`: mean and standard deviation of the posterior."""
        codec: Any = vae
        with torch.no_grad():
            posterior = codec.encode(pixels.to(codec.dtype)).latent_dist
        return {"mean": posterior.mean.float(), "std": posterior.std.float()}

    def latents(
        self, cached: Mapping[str, Tensor], vae_config: Mapping[str, Any], noise: Tensor | None
    ) -> Tensor:
        """See `Family.latents`. Without `noise`, the posterior's mean."""
        drawn = cached["mean"].float()
        if noise is not None:
            drawn = drawn + cached["std"].float() * noise
        return (drawn - float(vae_config["shift_factor"])) * float(vae_config["scaling_factor"])

    def predict(
        self, model: nn.Module, noisy: Tensor, sigmas: Tensor, text: Mapping[str, Tensor]
    ) -> Tensor:
        """See `Family.predict`. The time is 1000 sigma."""
        prediction: Tensor = model(
            hidden_states=noisy,
            timestep=sigmas * 1000,
            encoder_hidden_states=text["encoder_hidden_states"],
            pooled_projections=text["pooled_projections"],
            return_dict=False,
        )[0]
        return prediction

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
        clip = common.config_of(model, "text_encoder")["max_position_embeddings"]
        shape = (batch_size, config["in_channels"], height // factor, width // factor)
        tokens = (batch_size, clip + text.max_length, config["joint_attention_dim"])
        return Batch(
            latents=torch.zeros(shape, device=device),
            noise=torch.zeros(shape, device=device),
            sigmas=torch.full((batch_size,), 0.5, device=device),
            text={
                "encoder_hidden_states": torch.zeros(tokens, device=device),
                "pooled_projections": torch.zeros(
                    batch_size, config["pooled_projection_dim"], device=device
                ),
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
        """See `Family.denoise`. Bit-equal to `pipeline(prompt, ...)` where VAE and transformer have
        one type; the VAE may have another here.
        """
        pipeline = common.stock_pipeline(self.card, parts)
        with common.inference(parts["transformer"]):
            latents: Tensor = pipeline(
                width=width,
                height=height,
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=common.cpu_generator(seed),
                output_type="latent",
                **_prompt(positive, negative, pipeline.transformer),
            ).images
        return latents

    def decode(self, parts: Mapping[str, Any], latents: Tensor) -> Tensor:
        """See `Family.decode`."""
        vae = parts["vae"]
        unscaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        pixels: Tensor = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0]
        return pixels


def _clip(
    pipeline: Any, encoder: str, prompts: list[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    """One CLIP's hidden states and pooled projection, by the stock pipeline's own function."""
    number = ("text_encoder", "text_encoder_2").index(encoder)
    if number:  # the pipeline takes the number format from its first encoder
        pipeline.text_encoder = pipeline.text_encoder or pipeline.text_encoder_2
    states, pooled = pipeline._get_clip_prompt_embeds(
        prompts, device=device, clip_model_index=number
    )
    return states, pooled


def _prompt(
    positive: TextEmbedding, negative: TextEmbedding, transformer: Any
) -> dict[str, Tensor]:
    def batched(embedding: TextEmbedding, key: str) -> Tensor:
        return embedding[key][None].to(transformer.device, transformer.dtype)

    return {
        "prompt_embeds": batched(positive, "encoder_hidden_states"),
        "pooled_prompt_embeds": batched(positive, "pooled_projections"),
        "negative_prompt_embeds": batched(negative, "encoder_hidden_states"),
        "negative_pooled_prompt_embeds": batched(negative, "pooled_projections"),
    }


FAMILY = StableDiffusion3()
