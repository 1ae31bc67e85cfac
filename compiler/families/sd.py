"""Stable Diffusion 1 and 2 (arXiv 2112.10752): a UNet that predicts the noise, or v.

Configurations are those of the published folders, as Diffusers stores them; a key that is absent
has its class's default. Parameter counts are of those classes.
"""

from __future__ import annotations

from typing import Any

from attrs import evolve

from compiler.families import unet, whole_file
from compiler.families.card import Configs, FamilyCard, KnownModel
from compiler.families.whole_file import Held, WholeFile

CLIP: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-05,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
CLIP_L: dict[str, Any] = {  # openai/clip-vit-large-patch14
    **CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_H: dict[str, Any] = {  # laion/CLIP-ViT-H-14 without its last layer
    **CLIP,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
UNET_2: dict[str, Any] = {
    **UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
NOISE = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
PNDM: dict[str, Any] = {**SCHEDULER, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
DDIM_V: dict[str, Any] = {
    **SCHEDULER,
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "prediction_type": "v_prediction",
}
TURBO: dict[str, Any] = {
    **{key: SCHEDULER[key] for key in NOISE},
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
}
VAE_PARAMETERS = 83_653_863


def _first(base: str) -> KnownModel:
    return KnownModel(
        base=base,
        resolution=512,
        configs={"scheduler": PNDM, "text_encoder": CLIP_L, "unet": UNET, "vae": VAE},
        parameters={"text_encoder": 123_060_480, "unet": 859_520_964, "vae": VAE_PARAMETERS},
    )


def _second(base: str, resolution: int, **unet_facts: Any) -> KnownModel:
    """The models of 768 pixels predict v, those of 512 the noise."""
    scheduler = DDIM_V if resolution == 768 else PNDM
    return KnownModel(
        base=base,
        resolution=resolution,
        configs={
            "scheduler": scheduler,
            "text_encoder": CLIP_H,
            "unet": {**UNET_2, "sample_size": resolution // 8, **unet_facts},
            "vae": {**VAE, "sample_size": resolution},
        },
        parameters={"text_encoder": 340_387_840, "unet": 865_910_724, "vae": VAE_PARAMETERS},
    )


def _turbo() -> KnownModel:
    """Its model card: distilled (ADD) into one to four steps at 512 pixels, without guidance."""
    model = _second("stabilityai/sd-turbo", 512)
    return evolve(
        model,
        configs={**model.configs, "scheduler": TURBO},
        guidance=0.0,
        inference_steps=4,
        undistilled="stabilityai/stable-diffusion-2-1",
    )


def _embedding_shapes(configs: Configs, max_length: int) -> dict[str, tuple[int, ...]]:
    width = int(configs["text_encoder"]["hidden_size"])
    return {"encoder_hidden_states": (max_length, width)}


CARD = FamilyCard(
    name="sd",
    own_config=lambda config: unet.told(config) == "prompt",
    title="Stable Diffusion 1 and 2",
    pipeline="StableDiffusionPipeline",
    pipeline_options={
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    },
    components={
        "scheduler": "PNDMScheduler",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    },
    text_encoders=("text_encoder",),
    trainable_encoders=("text_encoder",),
    embedding_keys={"text_encoder": ""},
    kohya_encoders={"text_encoder": "lora_te"},
    trained_component="unet",
    blocks=unet.BLOCKS,
    depth=unet.depth,
    runs=None,
    shortened=unet.shortened,
    latent_channels_key="latent_channels",
    moments=("mean", "std"),
    embedding_shapes=_embedding_shapes,
    unpadded_text=False,
    prompt_length=77,
    instruction=(),
    default_resolution=512,
    sampling="uniform",
    default_shift=1.0,
    token_shift=None,
    prediction="epsilon",
    guidance=7.5,
    inference_steps=50,
    target_sets=unet.TARGET_SETS,
    default_targets="attention",
    fp16_overflows=False,
    masked_attention=False,
    cross_attention=("attn2",),
    attention="self- and cross-attention",
    known=(
        _first("stable-diffusion-v1-5/stable-diffusion-v1-5"),
        _first("CompVis/stable-diffusion-v1-4"),
        _second("stabilityai/stable-diffusion-2-base", 512),
        _second("stabilityai/stable-diffusion-2-1-base", 512),
        _second("stabilityai/stable-diffusion-2", 768),
        _second("stabilityai/stable-diffusion-2-1", 768, upcast_attention=True),
        _turbo(),
    ),
    traps=(
        "Stable Diffusion 2 at 768 pixels predicts v; its scheduler says so, and training follows.",
    ),
    whole_file=WholeFile(
        parts={
            "unet": (Held(whole_file.MODEL, unet.probes),),
            "vae": whole_file.VAES,
            # Version 1, and version 2.
            "text_encoder": (
                Held("cond_stage_model.transformer.", whole_file.clip),
                Held("cond_stage_model.model.", whole_file.open_clip),
            ),
        },
        usual=("unet", "vae", "text_encoder"),
    ),
)
