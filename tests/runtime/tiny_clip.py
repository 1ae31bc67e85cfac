"""A tiny CLIP model with random weights, as Transformers saves one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tests.runtime.tiny import clip_tokenizer

EDGE = 32  # pixels that it sees
TOKENS = 20  # that it reads


def make_clip(folder: Path) -> Path:
    """Writes it to `folder` and returns that."""
    tokenizer = clip_tokenizer("<|endoftext|>")
    shared = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**shared, **text},
        vision_config={**shared, "image_size": EDGE, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(3)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": EDGE, "width": EDGE}
    CLIPImageProcessor(size={"shortest_edge": EDGE}, crop_size=size).save_pretrained(folder)
    return folder
