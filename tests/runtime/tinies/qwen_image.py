"""A tiny Qwen-Image."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from compiler.families import qwen_image
from tests.runtime.tinies.z_image import qwen_tokenizer

# For the memory: small, but with every kind of layer of the published ones.
BASE = "Qwen/Qwen-Image"
SMALL: dict[str, Any] = {
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": 48,
    "axes_dims_rope": [8, 12, 12],
}
PARTS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "text_config": {
            **qwen_image.TEXT,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
        },
        "vision_config": {
            **qwen_image.VISION,
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 48,
        },
    },
    "vae": {"base_dim": 8},
}


def pipeline(overrides: dict[str, Any]) -> QwenImagePipeline:
    """Two blocks; latents of 4 channels, 8 pixels an edge each."""
    tokenizer = qwen_tokenizer()
    qwen = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    )
    config: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (2, 2, 4),
        **overrides,
    }
    channels = config["in_channels"] // 4
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(**config),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            max_image_seq_len=8192,
            base_shift=0.5,
            max_shift=0.9,
            shift_terminal=0.02,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=channels,
            num_res_blocks=1,
            latents_mean=[0.1 * n for n in range(channels)],
            latents_std=[1.0 + 0.2 * n for n in range(channels)],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(qwen).eval(),
        tokenizer=tokenizer,
    )
