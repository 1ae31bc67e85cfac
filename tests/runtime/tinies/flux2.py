"""A tiny Flux.2 klein."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

# For the memory: small, but with every kind of layer of the published ones.
BASE = "black-forest-labs/FLUX.2-klein-base-4B"
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "axes_dims_rope": [8, 8, 8, 8],
    "joint_attention_dim": 144,
}
PARTS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 27,  # whose last is asked for
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
    },
    "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen 3 has it, without tools and without turns of an assistant."""


def tokenizer() -> Qwen2Tokenizer:
    """One token a byte."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: n for n, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    made = Qwen2Tokenizer(
        vocab=vocab, merges=[], pad_token="<|endoftext|>", additional_special_tokens=special[1:]
    )
    made.chat_template = CHAT
    return made


def pipeline(overrides: dict[str, Any]) -> Flux2KleinPipeline:
    """Two double and two single blocks; latents of 4 channels, 8 pixels an edge each."""
    tokens = tokenizer()
    encoder = Qwen3Config(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=27,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "axes_dims_rope": (2, 2, 2, 2),
        "joint_attention_dim": 48,
        "guidance_embeds": False,
        **overrides,
    }
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(**config),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=vae(config["in_channels"] // 4),
        text_encoder=Qwen3ForCausalLM(encoder).eval(),
        tokenizer=tokens,
    )


def vae(channels: int) -> AutoencoderKLFlux2:
    """One that stands for 8 pixels an edge; its statistics are not those of a fresh one."""
    made = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8),
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=64,
    )
    made.bn.running_mean = torch.randn(4 * channels) * 0.1
    made.bn.running_var = torch.rand(4 * channels) + 0.5
    return made
