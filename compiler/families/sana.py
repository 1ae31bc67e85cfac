"""Sana (arXiv 2410.10629) and SANA-1.5 (arXiv 2501.18427): linear-attention diffusion transformers.

Configurations are those of Diffusers' `convert_sana_to_diffusers.py`, which made the published
folders; a key that is absent has its class's default. Parameter counts are of those classes.
"""

from __future__ import annotations

from typing import Any

from compiler.families.card import Configs, FamilyCard, KnownModel, counted

INSTRUCTION = (  # the default of SanaPipeline.__call__; the last line ends with a space
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual "
    "descriptions suitable for image generation. Evaluate the level of detail in the user "
    "prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, "
    "textures, and spatial relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly "
    "without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round "
    "shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red "
    "flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, "
    "featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a "
    "double-decker bus passing by towering glass skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including "
    "any additional commentary or evaluations:",
    "User Prompt: ",
)

# DC-AE f32c32 (arXiv 2410.10733): `convert_dcae_to_diffusers.py`, "dc-ae-f32c32-sana".
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderDC",
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}

# google/gemma-2-2b-it, the decoder without its head.
TEXT_ENCODER: dict[str, Any] = {
    "architectures": ["Gemma2Model"],
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

SMALL: dict[str, Any] = {  # 0.6B
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "num_layers": 28,
}
LARGE: dict[str, Any] = {  # 1.6B
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "num_layers": 20,
}
NORMED: dict[str, Any] = {**LARGE, "qk_norm": "rms_norm_across_heads"}  # SANA-1.5
DEEP: dict[str, Any] = {**NORMED, "num_layers": 60}  # SANA-1.5 4.8B

PARAMETERS = {"text_encoder": 2_614_341_888, "vae": 312_250_275}


UNIT_TIMES: dict[str, Any] = {"timestep_scale": 0.001}  # trained on times up to 1, for distilling


def _known(base: str, resolution: int, shape: dict[str, Any], parameters: int) -> KnownModel:
    transformer = {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": 32,
        "out_channels": 32,
        "attention_head_dim": 32,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "dropout": 0.0,
        "attention_bias": False,
        "patch_size": 1,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "sample_size": resolution // 32,
        "interpolation_scale": {2048: 1.0, 4096: 2.0}.get(resolution),
        **shape,
    }
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 6.0 if resolution == 4096 else 3.0,
    }
    return KnownModel(
        base=base,
        resolution=resolution,
        configs={
            "scheduler": scheduler,
            "text_encoder": TEXT_ENCODER,
            "transformer": transformer,
            "vae": VAE,
        },
        parameters={**PARAMETERS, "transformer": parameters},
    )


def _embedding_shapes(configs: Configs, max_length: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (max_length, int(configs["transformer"]["caption_channels"]))}


CARD = FamilyCard(
    name="sana",
    title="Sana",
    pipeline="SanaPipeline",
    components={
        "scheduler": "DPMSolverMultistepScheduler",
        "text_encoder": "Gemma2Model",
        "tokenizer": "GemmaTokenizer",
        "transformer": "SanaTransformer2DModel",
        "vae": "AutoencoderDC",
    },
    text_encoders=("text_encoder",),
    trained_component="transformer",
    blocks=("transformer_blocks",),
    depth=counted("num_layers"),
    runs=lambda config: [int(config.get("num_layers", 0))],
    shortened=lambda config, counts: {**config, "num_layers": counts[0]},
    latent_channels_key="latent_channels",
    moments=("mean",),
    embedding_shapes=_embedding_shapes,
    unpadded_text=True,
    prompt_length=300,
    instruction=INSTRUCTION,
    default_resolution=1024,
    sampling="logit-normal",  # NVlabs' own training: logit-normal(0, 1), flow shift 3
    default_shift=3.0,
    token_shift=None,  # SanaPipeline hands no mu to its scheduler
    prediction="flow",
    time="1000 sigma",
    few_step_pipeline="SanaSprintPipeline",
    guidance=4.5,
    inference_steps=20,
    target_sets={
        # The reference script's: self- and cross-attention, without the output projections.
        "attention": (r"transformer_blocks\.\d+\.attn[12]\.to_[qkv]",),
        "attention-out": (r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)",),
        # Half of Sana's weights are 1x1 convolutions, which are linear layers over pixels.
        "all-linear": (
            r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)",
            r"transformer_blocks\.\d+\.ff\.conv_(inverted|point)",
        ),
    },
    default_targets="attention",
    fp16_overflows=True,
    masked_attention=True,  # of prompts of different lengths
    cross_attention=("attn2",),
    attention="cross-attention; self-attention is linear, which no kernel of these computes",
    known=(
        _known("Efficient-Large-Model/Sana_600M_512px_diffusers", 512, SMALL, 591_747_872),
        _known("Efficient-Large-Model/Sana_600M_1024px_diffusers", 1024, SMALL, 591_747_872),
        _known("Efficient-Large-Model/Sana_1600M_512px_diffusers", 512, LARGE, 1_604_462_752),
        _known(
            "Efficient-Large-Model/Sana_1600M_512px_MultiLing_diffusers", 512, LARGE, 1_604_462_752
        ),
        _known("Efficient-Large-Model/Sana_1600M_1024px_diffusers", 1024, LARGE, 1_604_462_752),
        _known(
            "Efficient-Large-Model/Sana_1600M_1024px_MultiLing_diffusers",
            1024,
            LARGE,
            1_604_462_752,
        ),
        _known(
            "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", 1024, LARGE, 1_604_462_752
        ),
        _known("Efficient-Large-Model/Sana_1600M_2Kpx_BF16_diffusers", 2048, LARGE, 1_604_462_752),
        _known("Efficient-Large-Model/Sana_1600M_4Kpx_BF16_diffusers", 4096, LARGE, 1_604_462_752),
        _known("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", 1024, NORMED, 1_604_641_952),
        _known("Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers", 1024, DEEP, 4_721_825_952),
        _known(
            "Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers",
            1024,
            {**NORMED, **UNIT_TIMES},
            1_604_641_952,
        ),
        _known(
            "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers",
            1024,
            {**SMALL, "qk_norm": "rms_norm_across_heads", **UNIT_TIMES},
            591_876_896,
        ),
        _known("terminusresearch/sana-1.6b-1024px", 1024, LARGE, 1_604_462_752),
    ),
    traps=(
        "Sana's linear attention sums over all pixels in float32; fp16 activations overflow.",
        "The published scheduler folders state `flow_shift`, which loaders that read `shift` lose.",
        "SanaPipeline puts an instruction before each prompt; training does the same here.",
    ),
)
