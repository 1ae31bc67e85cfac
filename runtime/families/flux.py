"""Flux.1 at run time. See `compiler.families.flux` for the facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compiler.families import flux
from compiler.plan import Model, Text
from runtime.batch import Batch
from runtime.families import common
from runtime.families.base import TextEmbedding
from runtime.families.posterior import PosteriorLatents

T5 = "text_encoder_2"
KEYS = ("encoder_hidden_states", "pooled_projections")
PACKED = flux.CARD.packed


class Flux(PosteriorLatents):
    """FluxPipeline, FluxTransformer2DModel, AutoencoderKL, CLIP and T5.

    Latents are (B, 16, h, w) everywhere but in the model, see `packed`.
    """

    card = flux.CARD

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
        """See `Family.encode_with`: T5's states (length, channels), or CLIP's pooled (channels,).

        There is no mask: padding positions are inputs like others, so all of them are kept.
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
            return [{"encoder_hidden_states": each} for each in states]
        pooled = pipeline._get_clip_prompt_embeds(list(prompts), device=device)
        return [{"pooled_projections": each} for each in pooled]

    def join_text(self, shares: Mapping[str, TextEmbedding]) -> TextEmbedding:
        """See `Family.join_text`: each encoder gives one of the two."""
        return {key: tensor for share in shares.values() for key, tensor in share.items()}

    def collate_text(self, embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
        """See `Family.collate_text`. All prompts are of one length."""
        return {key: torch.stack([e[key] for e in embeddings]) for key in KEYS}

    def predict(
        self, model: nn.Module, noisy: Tensor, sigmas: Tensor, text: Mapping[str, Tensor]
    ) -> Tensor:
        """See `Family.predict`. The time is sigma, and `text` holds the guidance (B,) of a model
        that is told one."""
        height, width = noisy.shape[-2:]
        states = text["encoder_hidden_states"]
        prediction: Tensor = model(
            hidden_states=packed(noisy),
            timestep=sigmas,
            guidance=text.get("guidance"),
            encoder_hidden_states=states,
            pooled_projections=text["pooled_projections"],
            img_ids=places(height // PACKED, width // PACKED, noisy.device),
            txt_ids=torch.zeros(states.shape[1], 3, device=noisy.device),
            return_dict=False,
        )[0]
        return unpacked(prediction, height, width)

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
        channels = config["in_channels"] // PACKED**2
        shape = (batch_size, channels, height // factor, width // factor)
        tokens = (batch_size, text.max_length, config["joint_attention_dim"])
        pooled = (batch_size, config["pooled_projection_dim"])
        told = {
            "encoder_hidden_states": torch.zeros(tokens, device=device),
            "pooled_projections": torch.zeros(pooled, device=device),
        }
        if self.card.told_guidance(config):
            told["guidance"] = torch.ones(batch_size, device=device)
        return Batch(
            latents=torch.zeros(shape, device=device),
            noise=torch.zeros(shape, device=device),
            sigmas=torch.full((batch_size,), 0.5, device=device),
            text=told,
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
        """See `Family.denoise`. Bit-equal to `pipeline(prompt, ...)`, which uses no negative prompt
        unless it is asked for a second guidance, `true_cfg_scale`."""
        pipeline = common.stock_pipeline(self.card, parts)
        transformer = pipeline.transformer
        states, pooled = (
            positive[key][None].to(transformer.device, transformer.dtype) for key in KEYS
        )
        with common.inference(transformer):
            latents: Tensor = pipeline(
                prompt_embeds=states,
                pooled_prompt_embeds=pooled,
                width=width,
                height=height,
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=common.cpu_generator(seed),
                output_type="latent",
            ).images
        factor = pipeline.vae_scale_factor
        return unpacked(latents, height // factor, width // factor)


def packed(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C): each square of 2 x 2 latents is one token."""
    batch, channels, height, width = latents.shape
    rows, columns = height // PACKED, width // PACKED
    squares = latents.reshape(batch, channels, rows, PACKED, columns, PACKED)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`, for latents of this size."""
    rows, columns = height // PACKED, width // PACKED
    squares = tokens.reshape(tokens.shape[0], rows, columns, -1, PACKED, PACKED)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, height, width)


def places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Of each token, row by row: (0, row, column). (rows * columns, 3) float32."""
    row = torch.arange(rows, device=device, dtype=torch.float32)
    column = torch.arange(columns, device=device, dtype=torch.float32)
    grid = torch.zeros(rows, columns, 3, device=device)
    grid[..., 1], grid[..., 2] = row[:, None], column
    return grid.flatten(0, 1)


FAMILY = Flux()
