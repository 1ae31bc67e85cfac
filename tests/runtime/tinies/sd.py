"""A tiny Stable Diffusion 1; `prediction_type` among the overrides is the scheduler's."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.runtime.tiny import clip_tokenizer

# For the memory: small, but with every kind of layer of the published ones.
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SMALL: dict[str, Any] = {
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 48,
    "attention_head_dim": 4,
}
PARTS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    },
    "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
}

BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def pipeline(overrides: dict[str, Any]) -> StableDiffusionPipeline:
    """UNet of two levels, the first one without attention; VAE of factor 8."""
    tokenizer = clip_tokenizer("<|endoftext|>")
    stated = {"prediction_type": overrides.pop("prediction_type", "epsilon")}
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        **overrides,
    }
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**config),
        scheduler=PNDMScheduler(skip_prk_steps=True, **BETAS, **stated),
        vae=vae(config["in_channels"], 0.18215),
        text_encoder=CLIPTextModel(clip(tokenizer, 16)).eval(),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def vae(channels: int, scaling_factor: float) -> AutoencoderKL:
    """One that stands for 8 pixels an edge."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=scaling_factor,
    )


def clip(tokenizer: CLIPTokenizer, width: int, **options: Any) -> CLIPTextConfig:
    """A CLIP text model of three layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
