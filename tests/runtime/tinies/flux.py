"""A tiny Flux.1: like dev, it is told a guidance scale."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from tests.runtime.tinies.sd import clip
from tests.runtime.tiny import clip_tokenizer, t5_tokenizer

# For the memory: small, but with every kind of layer of the published ones.
BASE = "black-forest-labs/FLUX.1-dev"
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "axes_dims_rope": [8, 12, 12],
    "joint_attention_dim": 80,
    "pooled_projection_dim": 40,
}
PARTS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 40,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 128,
    },
    "text_encoder_2": {
        "vocab_size": 128,
        "d_model": 80,
        "d_kv": 8,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
    },
    "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
}


def pipeline(overrides: dict[str, Any]) -> FluxPipeline:
    """Two double and two single blocks; latents of 4 channels, 8 pixels an edge each."""
    tokenizer, tokenizer_2 = clip_tokenizer("<|endoftext|>"), t5_tokenizer()
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=48,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "axes_dims_rope": (2, 2, 4),
        "joint_attention_dim": 48,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        **overrides,
    }
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**config),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=AutoencoderKL(
            block_out_channels=(4, 4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=config["in_channels"] // 4,
            layers_per_block=1,
            norm_num_groups=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        text_encoder=CLIPTextModel(clip(tokenizer, 16)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer_2,
    )
