"""PixArt-Sigma (arXiv 2403.04692): a small diffusion transformer with T5 alone, up to 2K pixels.

It predicts the noise, on a linear table of noise levels, and beside it a variance that no sampler
of its pipeline reads. Configurations are those of PixArt's `convert_pixart_to_diffusers.py`, which
made the published folders; a key that is absent has its class's default. Parameter counts are of
those classes.
"""

from __future__ import annotations

from typing import Any

from compiler.families import sd3, sdxl
from compiler.families.card import Configs, FamilyCard, KnownModel, counted

SCHEDULER: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
}
SCALES = {256: 0.5, 512: 1, 1024: 2, 2048: 4}  # of the places of patches, by pixels


def _known(base: str, resolution: int) -> KnownModel:
    transformer = {
        "_class_name": "PixArtTransformer2DModel",
        "sample_size": resolution // 8,
        "num_layers": 28,
        "attention_head_dim": 72,
        "num_attention_heads": 16,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "interpolation_scale": SCALES[resolution],
        "use_additional_conditions": False,  # sizes were told to PixArt-Alpha only
    }
    return KnownModel(
        base=base,
        resolution=resolution,
        configs={
            "scheduler": SCHEDULER,
            "text_encoder": sd3.T5_XXL,
            "transformer": transformer,
            "vae": sdxl.VAE,
        },
        parameters={
            "text_encoder": 4_762_310_656,
            "transformer": 610_856_096,
            "vae": sdxl.PARAMETERS["vae"],
        },
    )


def _embedding_shapes(configs: Configs, max_length: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (max_length, int(configs["transformer"]["caption_channels"]))}


ATTENTION = r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)"
FEED_FORWARD = r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)"

CARD = FamilyCard(
    name="pixart",
    title="PixArt-Sigma",
    pipeline="PixArtSigmaPipeline",
    components={
        "scheduler": "DPMSolverMultistepScheduler",
        "text_encoder": "T5EncoderModel",
        "tokenizer": "T5Tokenizer",
        "transformer": "PixArtTransformer2DModel",
        "vae": "AutoencoderKL",
    },
    text_encoders=("text_encoder",),
    trained_component="transformer",
    blocks=("transformer_blocks",),
    depth=counted("num_layers"),
    runs=lambda config: [int(config.get("num_layers", 0))],
    shortened=lambda config, counts: {**config, "num_layers": counts[0]},
    latent_channels_key="latent_channels",
    moments=("mean", "std"),
    embedding_shapes=_embedding_shapes,
    unpadded_text=True,
    prompt_length=300,
    instruction=(),
    default_resolution=1024,
    sampling="uniform",
    default_shift=1.0,
    token_shift=None,
    prediction="epsilon",
    guidance=4.5,
    inference_steps=20,
    target_sets={
        "attention": (ATTENTION,),
        "all-linear": (ATTENTION, FEED_FORWARD),
        # What the authors' script matches, but for the patches, which are no 1x1 convolution.
        "reference-script": (
            ATTENTION,
            FEED_FORWARD,
            r"adaln_single\.(linear|emb\.timestep_embedder\.linear_[12])",
            r"caption_projection\.linear_[12]",
            r"proj_out",
        ),
    },
    default_targets="attention",
    fp16_overflows=False,
    overflowing=("vae",),
    masked_attention=True,  # of prompts of different lengths
    cross_attention=("attn2",),
    attention="self- and cross-attention",
    known=(
        _known("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 1024),
        _known("PixArt-alpha/PixArt-Sigma-XL-2-512-MS", 512),
        _known("PixArt-alpha/PixArt-Sigma-XL-2-2K-MS", 2048),
        _known("PixArt-alpha/PixArt-Sigma-XL-2-256x256", 256),
    ),
    lora_loader="peft",
    traps=(
        "Half of the model's output is a variance. As in the authors' script for Diffusers it gets "
        "no gradient: the pipeline throws it away.",
        "Diffusers has no LoRA loader for PixArt. A LoRA is written as peft has it: "
        "`PeftModel.from_pretrained(pipeline.transformer, FOLDER)`.",
        "Prompts are put in small letters. The pipeline also cleans them (`clean_caption`) where "
        "the packages bs4 and ftfy are installed; training never does.",
    ),
)
