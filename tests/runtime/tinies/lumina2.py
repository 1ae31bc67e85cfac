"""A tiny Lumina-Image 2.0."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model

from tests.runtime.tiny import gemma_tokenizer

# For the memory: small, but with every kind of layer of the published ones.
BASE = "Alpha-VLLM/Lumina-Image-2.0"
SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "num_layers": 3,
    "num_attention_heads": 6,
    "num_kv_heads": 2,
    "multiple_of": 32,
    "axes_dim_rope": [4, 6, 6],
    "axes_lens": [64, 32, 32],
    "cap_feat_dim": 48,
}
PARTS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "vocab_size": 128,
    },
    "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
}


def flow_vae(channels: int) -> AutoencoderKL:
    """Flux's, small: latents are moved and scaled, 8 pixels an edge each."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def pipeline(overrides: dict[str, Any]) -> Lumina2Pipeline:
    """Two blocks, and one that refines each of text and noise."""
    tokenizer = gemma_tokenizer()
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=4096,
        sliding_window=512,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (300, 32, 32),
        "cap_feat_dim": 16,
        **overrides,
    }
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(**config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=flow_vae(config["in_channels"]),
        text_encoder=Gemma2Model(gemma).eval(),
        tokenizer=tokenizer,
    )
