"""A tiny Z-Image."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests.runtime.tinies.lumina2 import flow_vae
from tests.runtime.tiny import LETTERS

# For the memory: small, but with every kind of layer of the published ones.
BASE = "Tongyi-MAI/Z-Image"
SMALL: dict[str, Any] = {
    "dim": 96,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 48,
    "axes_dims": [8, 12, 12],
    "axes_lens": [64, 32, 32],
}
PARTS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
    },
    "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a byte, as far as the prompts need them, and a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [*LETTERS, "\u0120", "\u010a", "\u00c3", "\u00a9"]  # space, line, two of é
    vocab = {token: n for n, token in enumerate([*special, *letters])}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        chat_template=TEMPLATE,
    )


def pipeline(overrides: dict[str, Any]) -> ZImagePipeline:
    """Two blocks, and one that refines each of text and noise."""
    tokenizer = qwen_tokenizer()
    qwen = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    config: dict[str, Any] = {
        "in_channels": 4,
        "dim": 24,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": 16,
        "axes_dims": [4, 2, 2],
        "axes_lens": [640, 32, 32],
        **overrides,
    }
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(**config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(config["in_channels"]),
        text_encoder=Qwen3Model(qwen).eval(),
        tokenizer=tokenizer,
    )
