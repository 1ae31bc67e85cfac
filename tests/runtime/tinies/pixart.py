"""A tiny PixArt-Sigma."""

from __future__ import annotations

from typing import Any

from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from tests.runtime.tinies.sd import vae
from tests.runtime.tiny import t5_tokenizer

# For the memory: small, but with every kind of layer of the published ones.
BASE = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
SMALL: dict[str, Any] = {
    "sample_size": 16,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "caption_channels": 48,
}
PARTS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "vocab_size": 128,
        "d_model": 48,
        "d_kv": 8,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
    },
    "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
}


def pipeline(overrides: dict[str, Any]) -> PixArtSigmaPipeline:
    """Two blocks, made for 64 pixels; VAE of factor 8."""
    tokenizer = t5_tokenizer()
    t5 = T5Config(
        vocab_size=len(tokenizer),
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    config: dict[str, Any] = {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 24,
        "in_channels": 4,
        "out_channels": 8,
        "use_additional_conditions": False,
        **overrides,
    }
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(t5).eval(),
        vae=vae(config["in_channels"], 0.13025),
        transformer=PixArtTransformer2DModel(**config),
        scheduler=DPMSolverMultistepScheduler(),
    )
