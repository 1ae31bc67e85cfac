"""The refiner of Stable Diffusion XL (arXiv 2307.01952, section 2.5): an expert for little noise.

Configurations are those of the published folders, as Diffusers stores them; a key that is absent
has its class's default. Parameter counts are of those classes.
"""

from __future__ import annotations

from typing import Any

from compiler.families import sdxl, unet
from compiler.families.card import Configs, FamilyCard, KnownModel

UNET: dict[str, Any] = {
    **sdxl.SIZED,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": [
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}


def _known(base: str) -> KnownModel:
    return KnownModel(
        base=base,
        resolution=1024,
        configs={
            "scheduler": sdxl.SCHEDULER,
            "text_encoder_2": sdxl.TEXT_PROJECTED,
            "unet": UNET,
            "vae": sdxl.VAE,
        },
        parameters={
            "text_encoder_2": sdxl.PARAMETERS["text_encoder_2"],
            "unet": 0,
            "vae": sdxl.PARAMETERS["vae"],
        },
    )
