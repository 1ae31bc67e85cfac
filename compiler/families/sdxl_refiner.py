"""The refiner of Stable Diffusion XL (arXiv 2307.01952, section 2.5): an expert for little noise.

Configurations are those of the published folders, as Diffusers stores them; a key that is absent
has its class's default. Parameter counts are of those classes.
"""

from __future__ import annotations

from typing import Any

from attrs import evolve

from compiler.families import sdxl, unet, whole_file
from compiler.families.card import Configs, KnownModel
from compiler.families.whole_file import Held, WholeFile

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
            "unet": 2_259_526_660,
            "vae": sdxl.PARAMETERS["vae"],
        },
    )


def _embedding_shapes(configs: Configs, max_length: int) -> dict[str, tuple[int, ...]]:
    encoder = configs["text_encoder_2"]
    return {
        "encoder_hidden_states": (max_length, int(encoder["hidden_size"])),
        "text_embeds": (int(encoder["projection_dim"]),),
    }


CARD = evolve(
    sdxl.CARD,
    name="sdxl_refiner",
    own_config=lambda config: unet.told(config) == "sizes and score",
    title="Stable Diffusion XL refiner",
    pipeline="StableDiffusionXLImg2ImgPipeline",
    pipeline_options={
        "add_watermarker": False,
        "requires_aesthetics_score": True,
        "text_encoder": None,
        "tokenizer": None,
    },
    components={
        "scheduler": "EulerDiscreteScheduler",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_2": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    },
    text_encoders=("text_encoder_2",),
    trainable_encoders=("text_encoder_2",),
    places=None,
    embedding_keys={"text_encoder_2": "clip_g"},  # as in a file for SDXL
    kohya_encoders={"text_encoder_2": "lora_te"},  # ComfyUI's, of the larger CLIP alone
    runs=None,
    embedding_shapes=_embedding_shapes,
    known=(
        _known("stabilityai/stable-diffusion-xl-refiner-1.0"),
        _known("stabilityai/stable-diffusion-xl-refiner-0.9"),
    ),
    zeros_for_empty=False,
    refines=0.3,
    made_for=0.2,
    traps=(
        sdxl.OVERFLOW,
        "It is made for the last fifth of the noise levels and trained on these alone, unless "
        "`[train.timesteps] max` says otherwise.",
        "It draws nothing by itself: pictures of a validation refine the one that `[validation] "
        "picture` names.",
        "Beside sizes and cuts it is told how pleasing a picture is: 6 of 10 in training, as in "
        "drawing.",
    ),
    whole_file=WholeFile(
        parts={
            "unet": (Held(whole_file.MODEL, unet.probes),),
            "vae": whole_file.VAES,
            "text_encoder_2": (Held("conditioner.embedders.0.model.", whole_file.open_clip),),
        },
        usual=("unet", "vae", "text_encoder_2"),
    ),
)
