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
from runtime.families.clip import Configs, Shares, end_state
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

    def encode_tokens(self, encoder: str, module: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
        """See `TrainsText.encode_tokens`: CLIP's pooled."""
        return {"pooled_projections": end_state(module, tokens)}

    def with_shares(
        self, text: Mapping[str, Tensor], shares: Shares, configs: Configs
    ) -> dict[str, Tensor]:
        """See `TrainsText.with_shares`: CLIP gives one of the two."""
        (share,) = shares.values()
        return {**text, **share}

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
