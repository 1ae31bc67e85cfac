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
from runtime.families.clip import Configs, Shares, inner_states, replaced
from runtime.families.posterior import PosteriorLatents

T5 = "text_encoder_3"


class StableDiffusion3(PosteriorLatents):
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

    def encode_tokens(self, encoder: str, module: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
        """See `TrainsText.encode_tokens`: of a CLIP."""
        states, projected = inner_states(module, tokens)
        return {"states": states, "pooled": projected}

    def with_shares(
        self, text: Mapping[str, Tensor], shares: Shares, configs: Configs
    ) -> dict[str, Tensor]:
        """See `TrainsText.with_shares`: each CLIP has its own channels of the first tokens and of
        the pooled ones."""
        states, together = text["encoder_hidden_states"], text["pooled_projections"]
        count = next(iter(shares.values()))["states"].shape[1]
        clips, place, place_pooled = states[:, :count], 0, 0
        for name in self.card.trainable_encoders:
            if name in shares:
                clips = replaced(clips, shares[name]["states"], place)
                together = replaced(together, shares[name]["pooled"], place_pooled)
            place += int(configs[name]["hidden_size"])
            place_pooled += int(configs[name]["projection_dim"])
        return {
            **text,
            "encoder_hidden_states": torch.cat([clips, states[:, count:]], dim=1),
            "pooled_projections": together,
        }

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
        told = common.zero_text(self.card, model, batch_size, text, device)
        return common.zeros(self.card, model, (width, height), batch_size, told, device)

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
