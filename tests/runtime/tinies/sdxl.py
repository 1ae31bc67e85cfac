"""A tiny Stable Diffusion XL; `prediction_type` among the overrides is the scheduler's."""

from __future__ import annotations

from typing import Any

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.runtime.tinies.sd import BETAS, clip, vae
from tests.runtime.tiny import clip_tokenizer

# For the memory: small, but with every kind of layer of the published ones.
BASE = "stabilityai/stable-diffusion-xl-base-1.0"
SMALL: dict[str, Any] = {
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 80,
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 32 + 6 * 16,
}
CLIPS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    },
    "text_encoder_2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 32,
        "vocab_size": 128,
    },
}
PARTS: dict[str, dict[str, Any]] = {
    **CLIPS,
    "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
}
TOLD: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}


def pipeline(overrides: dict[str, Any]) -> StableDiffusionXLPipeline:
    """UNet of two levels, the second one with two transformer blocks each; VAE of factor 8."""
    tokenizers = [clip_tokenizer("<|endoftext|>"), clip_tokenizer("!")]
    stated = {"prediction_type": overrides.pop("prediction_type", "epsilon")}
    zeros = overrides.pop("force_zeros_for_empty_prompt", True)
    second = clip(tokenizers[1], 24, hidden_act="gelu")
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(**unet(16 + 24, 24 + 6 * 8, **overrides)),
        scheduler=scheduler(**stated),
        vae=vae(4, 0.13025),
        text_encoder=CLIPTextModel(clip(tokenizers[0], 16)).eval(),
        tokenizer=tokenizers[0],
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer_2=tokenizers[1],
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def scheduler(**options: Any) -> EulerDiscreteScheduler:
    """As published."""
    return EulerDiscreteScheduler(timestep_spacing="leading", **{**BETAS, **options})


def unet(text: int, told: int, **overrides: Any) -> dict[str, Any]:
    """A UNet for embeddings of `text` channels, told `told` numbers."""
    return {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": text,
        "projection_class_embeddings_input_dim": told,
        **TOLD,
        **overrides,
    }
