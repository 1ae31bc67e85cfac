"""A tiny Kolors."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers import KolorsPipeline, UNet2DConditionModel
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

from tests.runtime.tinies.sd import vae
from tests.runtime.tinies.sdxl import scheduler, unet
from tests.runtime.tiny import LETTERS

# For the memory: small, but with every kind of layer of the published ones.
BASE = "Kwai-Kolors/Kolors-diffusers"
SMALL: dict[str, Any] = {
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 80,
    "encoder_hid_dim": 64,
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 64 + 6 * 16,
}
PARTS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "num_layers": 2,
        "padded_vocab_size": 128,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "kv_channels": 16,
        "num_attention_heads": 4,
        "seq_length": 64,
    },
    "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
}


def pipeline(overrides: dict[str, Any]) -> KolorsPipeline:
    """UNet of two levels, prompts projected from 16 channels to 24; VAE of factor 8."""
    tokenizer = _tokenizer()
    encoder = ChatGLMConfig(
        num_layers=3,
        padded_vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        ffn_hidden_size=24,
        kv_channels=8,
        num_attention_heads=2,
        multi_query_attention=True,
        multi_query_group_num=1,
        add_qkv_bias=True,
        seq_length=512,
        original_rope=True,
        use_cache=True,
    )
    projected = {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj", **overrides}
    return KolorsPipeline(
        unet=UNet2DConditionModel(**unet(24, 16 + 6 * 8, **projected)),
        scheduler=scheduler(num_train_timesteps=1100, beta_end=0.014),
        vae=vae(4, 0.13025),
        text_encoder=_drawn(ChatGLMModel(encoder, empty_init=False)).eval(),
        tokenizer=tokenizer,
    )


@torch.no_grad()
def _drawn(encoder: ChatGLMModel) -> ChatGLMModel:
    """With weights: its class sets none."""
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.3)
    return encoder


def _tokenizer() -> ChatGLMTokenizer:
    """One token a letter."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(LETTERS)] * 4),
        model_writer=written,
        model_type="char",
        vocab_size=len(LETTERS) + 4,
        character_coverage=1.0,
        minloglevel=2,
    )
    file = Path(tempfile.mkdtemp()) / "tokenizer.model"
    file.write_bytes(written.getvalue())
    return ChatGLMTokenizer(str(file))
