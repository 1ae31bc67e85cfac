"""Stable Diffusion XL (arXiv 2307.01952), the base model: a UNet that is told sizes and cuts.

Configurations are those of the published folders, as Diffusers stores them; a key that is absent
has its class's default. Parameter counts are of those classes.
"""

from __future__ import annotations

from typing import Any

from attrs import evolve

from compiler.families import sd, sd3, unet, whole_file
from compiler.families.card import Configs, FamilyCard, KnownModel
from compiler.families.whole_file import Held, WholeFile

TEXT_PROJECTED: dict[str, Any] = {**sd3.CLIP_G}  # with the projection that pools
VAE: dict[str, Any] = {
    **sd.VAE,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
TURBO: dict[str, Any] = {
    **{key: SCHEDULER[key] for key in sd.NOISE},
    "_class_name": "EulerAncestralDiscreteScheduler",
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
}
SIZED: dict[str, Any] = {  # what all UNets of this kind have
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "sample_size": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
}
UNET: dict[str, Any] = {
    **SIZED,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
}
PARAMETERS = {
    "text_encoder": 123_060_480,
    "text_encoder_2": 694_659_840,
    "unet": 2_567_463_684,
    "vae": sd.VAE_PARAMETERS,
}
OVERFLOW = (
    "The VAE overflows in fp16, which gives black pictures; it is kept in float32. Its mended "
    "version says `force_upcast = false` in its configuration."
)


def _known(base: str) -> KnownModel:
    return KnownModel(
        base=base,
        resolution=1024,
        configs={
            "scheduler": SCHEDULER,
            "text_encoder": sd.CLIP_L,
            "text_encoder_2": TEXT_PROJECTED,
            "unet": UNET,
            "vae": VAE,
        },
        parameters=PARAMETERS,
    )


BASE = _known("stabilityai/stable-diffusion-xl-base-1.0")


def _turbo() -> KnownModel:
    """Its model card: distilled (ADD) into one to four steps at 512 pixels, without guidance."""
    made = {"scheduler": TURBO, "unet": {**UNET, "sample_size": 64}}
    return evolve(
        BASE,
        base="stabilityai/sdxl-turbo",
        resolution=512,
        configs={**BASE.configs, **made},
        guidance=0.0,
        inference_steps=4,
        undistilled=BASE.base,
    )


def _embedding_shapes(configs: Configs, max_length: int) -> dict[str, tuple[int, ...]]:
    first, second = configs["text_encoder"], configs["text_encoder_2"]
    width = int(first["hidden_size"]) + int(second["hidden_size"])
    return {
        "encoder_hidden_states": (max_length, width),
        "text_embeds": (int(second["projection_dim"]),),
    }


CARD = FamilyCard(
    name="sdxl",
    own_config=lambda config: unet.told(config) == "sizes",
    title="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    pipeline_options={"add_watermarker": False},
    components={
        "scheduler": "EulerDiscreteScheduler",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    },
    text_encoders=("text_encoder", "text_encoder_2"),
    trainable_encoders=("text_encoder", "text_encoder_2"),
    embedding_keys={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    kohya_encoders={"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    trained_component="unet",
    blocks=unet.BLOCKS,
    depth=unet.depth,
    runs=unet.runs,
    places=unet.places,
    shortened=unet.shortened,
    latent_channels_key="latent_channels",
    moments=("mean", "std"),
    embedding_shapes=_embedding_shapes,
    unpadded_text=False,
    prompt_length=77,
    instruction=(),
    default_resolution=1024,
    sampling="uniform",
    default_shift=1.0,
    token_shift=None,
    prediction="epsilon",
    guidance=5.0,
    inference_steps=50,
    target_sets=unet.TARGET_SETS,
    default_targets="attention",
    fp16_overflows=False,
    overflowing=("vae",),
    masked_attention=False,
    cross_attention=("attn2",),
    attention="self- and cross-attention",
    known=(
        BASE,
        _known("stabilityai/stable-diffusion-xl-base-0.9"),
        _turbo(),
    ),
    size_conditions=True,
    zeros_for_empty=True,
    traps=(
        OVERFLOW,
        "The model is told each picture's size and where it was cut: the true ones, of what the "
        "VAE saw. Pictures are drawn as if they were large and uncut.",
        "An empty negative prompt is zeros, not an encoded empty text (`model_index.json` says "
        "so); so is a dropped caption.",
    ),
    whole_file=WholeFile(
        parts={
            "unet": (Held(whole_file.MODEL, unet.probes),),
            "vae": whole_file.VAES,
            "text_encoder": (Held("conditioner.embedders.0.transformer.", whole_file.clip),),
            "text_encoder_2": (Held("conditioner.embedders.1.model.", whole_file.open_clip),),
        },
        usual=("unet", "vae", "text_encoder", "text_encoder_2"),
    ),
)
