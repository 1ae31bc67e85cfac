"""A tiny Flux.2 dev: like the published one, it is told a guidance scale."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from tests.runtime.tinies import flux2

# For the memory: small, but with every kind of layer of the published ones.
BASE = "black-forest-labs/FLUX.2-dev"
SMALL: dict[str, Any] = {**flux2.SMALL, "joint_attention_dim": 144}
LANGUAGE: dict[str, Any] = {
    "model_type": "mistral",
    "num_hidden_layers": 30,  # whose last is asked for
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 48,
    "intermediate_size": 96,
    "vocab_size": 128,
}
EYES: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
PARTS: dict[str, dict[str, Any]] = {
    "text_encoder": {"text_config": LANGUAGE, "vision_config": EYES},
    "vae": flux2.PARTS["vae"],
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]"
    "{{ m.content[0].text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ m.content[0].text }}[/INST]"
    "{% endif %}{% endfor %}"
)
"""As Mistral Small 3.2 has it, for text alone."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; padding lies before the prompt."""
    special = ["<s>", "</s>", "<pad>", "<unk>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]"]
    special += ["[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*special, *letters])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
        padding_side="left",
        model_max_length=512,
    )
    tokens.chat_template = CHAT
    return tokens


def pipeline(overrides: dict[str, Any]) -> Flux2Pipeline:
    """Two double and two single blocks; latents of 4 channels, 8 pixels an edge each."""
    words = tokenizer()
    language = {
        **LANGUAGE,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(words),
    }
    encoder = Mistral3Config(
        text_config=language, vision_config=EYES, image_token_index=8, spatial_merge_size=2
    )
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "axes_dims_rope": (2, 2, 2, 2),
        "joint_attention_dim": 48,
        "guidance_embeds": True,
        **overrides,
    }
    return Flux2Pipeline(
        transformer=Flux2Transformer2DModel(**config),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=flux2.vae(config["in_channels"] // 4),
        text_encoder=Mistral3ForConditionalGeneration(encoder).eval(),
        tokenizer=words,
    )
