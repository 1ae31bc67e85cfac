"""Latents of the families whose autoencoder is Diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runtime.families import common


class PosteriorLatents(common.Stock):
    """What is cached is a normal distribution per picture; its draws are moved and scaled."""

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
        shift = float(vae_config.get("shift_factor") or 0.0)
        return (drawn - shift) * float(vae_config["scaling_factor"])

    def decode(self, parts: Mapping[str, Any], latents: Tensor) -> Tensor:
        """See `Family.decode`."""
        vae = parts["vae"]
        unscaled = latents.to(vae.dtype) / vae.config.scaling_factor
        if vae.config.shift_factor is not None:
            unscaled = unscaled + vae.config.shift_factor
        pixels: Tensor = vae.decode(unscaled, return_dict=False)[0]
        return pixels
