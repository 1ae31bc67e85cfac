"""SDXL's refiner at run time. See `compiler.families.sdxl_refiner` for the facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compiler.families import sdxl_refiner
from runtime.families import common
from runtime.families.base import PICTURE, Framed, TextEmbedding
from runtime.families.sdxl import ClipEncoded
from runtime.families.sized_unet import prompt_options

AESTHETIC = 6
"""How pleasing each training picture is said to be, of 10: what the pipeline says of what it draws.
"""


class Refiner(ClipEncoded):
    """StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel, AutoencoderKL and the larger CLIP."""

    card = sdxl_refiner.CARD

    def numbers(self, frame: Framed) -> list[int]:
        """As of SDXL, but how pleasing the picture is instead of its size after the cut."""
        return [*frame.original, *frame.crop, AESTHETIC]

    @torch.no_grad()
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
        """See `Family.denoise`: the picture `parts[PICTURE]` of this size, refined by the
        pipeline's own share of the steps. Bit-equal to `pipeline(prompt, image, ...)`.

        The picture is encoded here: the pipeline would round the VAE to the UNet's number format,
        and leave it so.
        """
        pipeline = common.stock_pipeline(self.card, parts)
        unet, vae, picture = parts["unet"], parts["vae"], parts[PICTURE]
        assert picture.shape[-2:] == (height, width), "the picture has the size that is drawn"
        generator = common.cpu_generator(seed)
        # A copy on every device, so that the simulation counts it.
        pixels = picture.to(vae.device, vae.dtype, copy=True)
        posterior = vae.encode(pixels).latent_dist
        del pixels
        start = posterior.sample(generator) * vae.config.scaling_factor
        with common.inference(unet):
            latents: Tensor = pipeline(
                image=start.to(unet.dtype),
                strength=self.card.refines,
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=generator,
                output_type="latent",
                **prompt_options(positive, negative, unet),
            ).images
        return latents


FAMILY = Refiner()
