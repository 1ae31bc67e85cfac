"""Qwen-Image (arXiv 2508.02324): a flow of double blocks, with Qwen2.5-VL for prompts.

The autoencoder is one for videos, of which a picture is the first frame. Configurations are those
of the published folders; a key that is absent has its class's default. Parameter counts are of
those classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compiler.families import whole_file
from compiler.families.card import Configs, FamilyCard, KnownModel, TokenShift, counted
from compiler.families.whole_file import Held, WholeFile

TEXT: dict[str, Any] = {
    "model_type": "qwen2_5_vl_text",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "use_sliding_window": False,
    "attention_dropout": 0.0,
}
VISION: dict[str, Any] = {  # runs for no prompt, but is loaded
    "model_type": "qwen2_5_vl",
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
    "tokens_per_second": 2,
}
QWEN_VL_7B: dict[str, Any] = {  # Qwen/Qwen2.5-VL-7B-Instruct
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "text_config": TEXT,
    "vision_config": VISION,
    "tie_word_embeddings": False,
}
TRANSFORMER: dict[str, Any] = {
    "_class_name": "QwenImageTransformer2DModel",
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLQwenImage",
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
    ],
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
}


def _known(base: str) -> KnownModel:
    return KnownModel(
        base=base,
        resolution=1328,
        configs={
            "scheduler": SCHEDULER,
            "text_encoder": QWEN_VL_7B,
            "transformer": TRANSFORMER,
            "vae": VAE,
        },
        parameters={
            "text_encoder": 8_292_166_656,
            "transformer": 20_430_401_088,
            "vae": 126_892_531,
        },
    )


BLOCKS = r"transformer_blocks\.\d+"
IMAGE = rf"{BLOCKS}\.attn\.(to_[qkv]|to_out\.0)"
PROMPT = rf"{BLOCKS}\.attn\.(add_[qkv]_proj|to_add_out)"


def _embedding_shapes(configs: Configs, max_length: int) -> dict[str, tuple[int, ...]]:
    width = int(configs["transformer"]["joint_attention_dim"])
    return {"encoder_hidden_states": (max_length, width)}


def probes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """What tells a transformer of this configuration by the shapes of its tensors: its publishers'
    names are Diffusers'."""
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    layers = int(config["num_layers"])
    return {
        "img_in.weight": (width, int(config["in_channels"])),
        "txt_in.weight": (width, int(config["joint_attention_dim"])),
        f"transformer_blocks.{layers - 1}.attn.add_q_proj.weight": (width, width),
        f"transformer_blocks.{layers}.attn.add_q_proj.weight": None,
        "addition_t_embedding.weight": None,  # of a model that makes layers
    }


CARD = FamilyCard(
    name="qwen_image",
    title="Qwen-Image",
    pipeline="QwenImagePipeline",
    components={
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
    },
    text_encoders=("text_encoder",),
    trained_component="transformer",
    blocks=("transformer_blocks",),
    depth=counted("num_layers"),
    # Nothing reads what the last block says of the prompt: part of it gets no gradient.
    runs=lambda config: [max(int(config.get("num_layers", 0)) - 1, 0)],
    shortened=lambda config, counts: {**config, "num_layers": counts[0] + 1},
    latent_channels_key="z_dim",
    latent_statistics=True,
    moments=("mean", "std"),
    embedding_shapes=_embedding_shapes,
    unpadded_text=True,
    prompt_length=512,
    instruction=(),
    default_resolution=1328,
    sampling="logit-normal",
    default_shift=1.0,
    # The defaults in QwenImagePipeline.__call__.
    token_shift=TokenShift(base_tokens=256, max_tokens=4096, base_shift=0.5, max_shift=1.15),
    prediction="flow",
    guidance=4.0,
    inference_steps=50,
    target_sets={
        # The reference script's: the image stream alone.
        "attention-image": (IMAGE,),
        "attention": (IMAGE, PROMPT),
        "all-linear": (
            IMAGE,
            PROMPT,
            rf"{BLOCKS}\.(img|txt)_mlp\.net\.(0\.proj|2)",
            rf"{BLOCKS}\.(img|txt)_mod\.1",
        ),
    },
    default_targets="attention-image",
    fp16_overflows=True,
    masked_attention=True,  # of prompts of different lengths
    attention="all attention",
    known=(_known("Qwen/Qwen-Image"), _known("Qwen/Qwen-Image-2512")),
    guidance_argument="true_cfg_scale",
    traps=(
        "Prompts stand in a system prompt's template, negative and empty ones too, as in the "
        "pipeline; the first 34 tokens, the template's, are cut off.",
        "The pipeline guides (`true_cfg_scale`) only if it is given a negative prompt, and scales "
        "what comes out to the length of what is predicted without.",
        "The example script trains without the shift that the pipeline samples with; here it "
        "follows each picture's size, as in the pipeline.",
        "Activations overflow in fp16.",
    ),
    whole_file=WholeFile(
        # ComfyUI's split files, and what other programs write.
        parts={"transformer": (Held("", probes), Held(whole_file.MODEL, probes))},
        usual=("transformer",),
    ),
)
