"""Flux.2 klein at run time. See `compiler.families.flux2` for the facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compiler.families import flux2
from compiler.plan import Model, Text
from runtime.batch import Batch
from runtime.families import common
from runtime.families.base import TextEmbedding
from runtime.families.flux import PACKED, packed, unpacked
from runtime.families.masked_text import OneEncoder

STATES = "encoder_hidden_states"


class Flux2Klein(OneEncoder, common.Stock):
    """Flux2KleinPipeline, Flux2Transformer2DModel, AutoencoderKLFlux2 and Qwen 3.

    Latents are (B, 32, h, w) everywhere but in the model, see `runtime.families.flux.packed`.
    """

    card = flux2.CARD

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
        """See `Family.encode_with`: states (length, channels) each, of three hidden layers.

        The encoder is told which tokens are padding; the transformer is not, so all are kept.
        Negative prompts are encoded like positive ones.
        """
        pipeline = common.stock_pipeline(self.card, parts)
        states, _ = pipeline.encode_prompt(
            list(prompts), device=parts[encoder].device, max_sequence_length=text.max_length
        )
        return [{STATES: each} for each in states]

    def collate_text(self, embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
        """See `Family.collate_text`. All prompts are of one length."""
        return {STATES: torch.stack([each[STATES] for each in embeddings])}

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        """See `Family.encode_pixels`: the posterior's mean, normalised as the pipeline normalises
        pictures that it is given: each of a square's 128 numbers by the autoencoder's statistics.
        """
        codec: Any = vae
        with torch.no_grad():
            tokens = packed(codec.encode(pixels.to(codec.dtype)).latent_dist.mode())
            mean, deviation = statistics(codec, tokens)
            height, width = (edge // factor_of(codec) for edge in pixels.shape[-2:])
            return {"mean": unpacked((tokens - mean) / deviation, height, width).float()}

    def latents(
        self, cached: Mapping[str, Tensor], vae_config: Mapping[str, Any], noise: Tensor | None
    ) -> Tensor:
        """See `Family.latents`: what is cached."""
        return cached["mean"].float()

    def predict(
        self, model: nn.Module, noisy: Tensor, sigmas: Tensor, text: Mapping[str, Tensor]
    ) -> Tensor:
        """See `Family.predict`. The time is sigma."""
        height, width = noisy.shape[-2:]
        states = text[STATES]
        prediction: Tensor = model(
            hidden_states=packed(noisy),
            timestep=sigmas,
            guidance=text.get("guidance"),
            encoder_hidden_states=states,
            img_ids=places(height // PACKED, width // PACKED, 1, noisy.device),
            txt_ids=places(1, 1, states.shape[1], noisy.device),
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
        """See `Family.denoise`. Bit-equal to `pipeline(prompt, ...)`. The latents are the
        autoencoder's own, no longer normalised: the pipeline undoes that."""
        pipeline = common.stock_pipeline(self.card, parts)
        transformer = pipeline.transformer
        names = ["prompt_embeds"]
        names += ["negative_prompt_embeds"] if self.card.negative_prompts else []
        given = {
            name: each[STATES][None].to(transformer.device, transformer.dtype)
            for name, each in zip(names, (positive, negative), strict=False)
        }
        with common.inference(transformer):
            latents: Tensor = pipeline(
                **given,
                width=width,
                height=height,
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=common.cpu_generator(seed),
                output_type="latent",
            ).images
        return latents

    def decode(self, parts: Mapping[str, Any], latents: Tensor) -> Tensor:
        """See `Family.decode`; `latents` are those that `denoise` gives."""
        vae = parts["vae"]
        pixels: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return pixels


def factor_of(vae: Any) -> int:
    """Pixels that one of its latents stands for, along an edge."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each of a square's numbers, (128,) each, as `like` is held."""
    mean = vae.bn.running_mean.to(like.device, like.dtype)
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return mean, torch.sqrt(variance).to(like.device, like.dtype)


def places(rows: int, columns: int, length: int, device: torch.device) -> Tensor:
    """Of each token: (0, row, column, place in the text). (rows * columns * length, 4) float32."""
    sizes = (1, rows, columns, length)
    grid = torch.zeros(*sizes, len(sizes), device=device)
    for axis, size in enumerate(sizes):
        shape = [size if other == axis else 1 for other in range(len(sizes))]
        grid[..., axis] = torch.arange(size, device=device, dtype=torch.float32).view(shape)
    return grid.view(-1, len(sizes))


FAMILY = Flux2Klein()
