"""A tiny refiner of Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection

from tests.runtime.tinies import sdxl
from tests.runtime.tinies.sd import clip, vae
from tests.runtime.tiny import clip_tokenizer

# For the memory: small, but with every kind of layer of the published ones.
BASE = "stabilityai/stable-diffusion-xl-refiner-1.0"
SMALL: dict[str, Any] = {
    "block_out_channels": [32, 32, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "transformer_layers_per_block": 2,
    "attention_head_dim": [2, 2, 4, 4],
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 32 + 5 * 16,
}
PARTS: dict[str, dict[str, Any]] = {
    "text_encoder_2": sdxl.CLIPS["text_encoder_2"],
    "vae": sdxl.PARTS["vae"],
}


def pipeline(overrides: dict[str, Any]) -> StableDiffusionXLImg2ImgPipeline:
    """One text encoder, and five numbers told."""
    tokenizer = clip_tokenizer("!")
    encoder = clip(tokenizer, 24, hidden_act="gelu")
    return StableDiffusionXLImg2ImgPipeline(
        unet=UNet2DConditionModel(**sdxl.unet(24, 24 + 5 * 8, **overrides)),
        scheduler=sdxl.scheduler(),
        vae=vae(4, 0.13025),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection(encoder).eval(),
        tokenizer_2=tokenizer,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
