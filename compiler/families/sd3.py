"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): MMDiT with three text encoders.

Configurations are those of Diffusers' `convert_sd3_to_diffusers.py` and of the published encoders;
a key that is absent has its class's default. Parameter counts are of those classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve

from compiler.families import whole_file
from compiler.families.card import Configs, FamilyCard, KnownModel, TokenShift, counted
from compiler.families.whole_file import Held, WholeFile

CLIP: dict[str, Any] = {
    "architectures": ["CLIPTextModelWithProjection"],
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
CLIP_G: dict[str, Any] = {  # laion/CLIP-ViT-bigG-14
    **CLIP,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL: dict[str, Any] = {  # google/t5-v1_1-xxl, the encoder
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-06,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "sample_size": 1024,
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
PARAMETERS = {
    "text_encoder": 123_650_304,
    "text_encoder_2": 694_659_840,
    "text_encoder_3": 4_762_310_656,
    "vae": 83_819_683,
}


LARGE = "stabilityai/stable-diffusion-3.5-large"


def _known(base: str, parameters: int, **shape: Any) -> KnownModel:
    transformer = {
        "_class_name": "SD3Transformer2DModel",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "sample_size": 128,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "num_attention_heads": shape["num_layers"],
        "caption_projection_dim": 64 * shape["num_layers"],
        "dual_attention_layers": [],
        "qk_norm": None,
        **shape,
    }
    return KnownModel(
        base=base,
        resolution=1024,
        configs={
            "scheduler": SCHEDULER,
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_G,
            "text_encoder_3": T5_XXL,
            "transformer": transformer,
            "vae": VAE,
        },
        parameters={**PARAMETERS, "transformer": parameters},
    )


IMAGE = r"to_[qkv]|to_out\.0"
TEXT = r"add_[qkv]_proj|to_add_out"  # the last block has no to_add_out


def _embedding_shapes(configs: Configs, max_length: int) -> dict[str, tuple[int, ...]]:
    """CLIP's tokens and T5's one after the other, and both CLIPs' pooled states."""
    transformer = configs["transformer"]
    tokens = int(configs["text_encoder"]["max_position_embeddings"]) + max_length
    return {
        "encoder_hidden_states": (tokens, int(transformer["joint_attention_dim"])),
        "pooled_projections": (int(transformer["pooled_projection_dim"]),),
    }


def _runs(config: Mapping[str, Any]) -> list[int] | None:
    """Blocks with a second attention, which come first, and those without; the last block, whose
    text stream ends, is neither's."""
    dual, layers = list(config.get("dual_attention_layers") or ()), int(config.get("num_layers", 0))
    if dual != list(range(len(dual))):
        return None
    return [min(len(dual), layers - 1), max(layers - 1 - len(dual), 0)]


def _shortened(config: Mapping[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    first, second = counts
    all_dual = len(config.get("dual_attention_layers") or ()) == int(config["num_layers"])
    dual = list(range(first + all_dual))
    return {**config, "num_layers": first + second + 1, "dual_attention_layers": dual}


def probes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """What tells an MMDiT of this configuration by the shapes of its tensors, under the names that
    were published (see `runtime.export.mmdit`)."""
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    layers, patch = int(config["num_layers"]), int(config["patch_size"])
    dual = 0 in config.get("dual_attention_layers", ())
    head = (int(config["attention_head_dim"]),) if config.get("qk_norm") else None
    return {
        "x_embedder.proj.weight": (width, int(config["in_channels"]), patch, patch),
        "context_embedder.weight": (
            int(config["caption_projection_dim"]),
            int(config["joint_attention_dim"]),
        ),
        f"joint_blocks.{layers - 1}.x_block.attn.qkv.weight": (3 * width, width),
        f"joint_blocks.{layers}.x_block.attn.qkv.weight": None,
        "joint_blocks.0.x_block.attn2.qkv.weight": (3 * width, width) if dual else None,
        "joint_blocks.0.x_block.attn.ln_q.weight": head,
    }


CARD = FamilyCard(
    name="sd3",
    title="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    components={
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5Tokenizer",
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
    },
    text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    trainable_encoders=("text_encoder", "text_encoder_2"),
    kohya_encoders={"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    trained_component="transformer",
    blocks=("transformer_blocks",),
    depth=counted("num_layers"),
    runs=_runs,
    shortened=_shortened,
    latent_channels_key="latent_channels",
    moments=("mean", "std"),
    embedding_shapes=_embedding_shapes,
    unpadded_text=False,
    prompt_length=256,
    instruction=(),
    default_resolution=1024,
    sampling="logit-normal",
    default_shift=3.0,
    # The defaults in StableDiffusion3Pipeline.__call__.
    token_shift=TokenShift(base_tokens=256, max_tokens=4096, base_shift=0.5, max_shift=1.16),
    prediction="flow",
    time="1000 sigma",
    guidance=7.0,
    inference_steps=28,
    target_sets={
        # The reference script's: both streams of the joint attention.
        "attention": (rf"transformer_blocks\.\d+\.attn\.({IMAGE}|{TEXT})",),
        # Also the second self-attention that SD3.5 Medium has in its first 13 blocks.
        "attention-all": (rf"transformer_blocks\.\d+\.attn2?\.({IMAGE}|{TEXT})",),
        # What `to_q, to_k, to_v, to_out.0` means in other trainers: the image stream alone.
        "attention-image": (rf"transformer_blocks\.\d+\.attn2?\.({IMAGE})",),
        "all-linear": (
            rf"transformer_blocks\.\d+\.attn2?\.({IMAGE}|{TEXT})",
            r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
            r"transformer_blocks\.\d+\.norm1(_context)?\.linear",
        ),
    },
    default_targets="attention",
    fp16_overflows=False,
    masked_attention=False,
    attention="all attention",
    known=(
        _known(
            "stabilityai/stable-diffusion-3-medium-diffusers",
            2_028_328_000,
            num_layers=24,
            pos_embed_max_size=192,
        ),
        _known(
            "stabilityai/stable-diffusion-3.5-medium",
            2_243_171_520,
            num_layers=24,
            pos_embed_max_size=384,
            dual_attention_layers=list(range(13)),
            qk_norm="rms_norm",
        ),
        _known(
            LARGE,
            8_056_627_520,
            num_layers=38,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
        evolve(
            _known(
                f"{LARGE}-turbo",
                8_056_627_520,
                num_layers=38,
                pos_embed_max_size=192,
                qk_norm="rms_norm",
            ),
            # Its model card: distilled (ADD) into four steps, drawn without guidance.
            guidance=0.0,
            inference_steps=4,
            undistilled=LARGE,
        ),
    ),
    traps=(
        "The example scripts weight the loss by sigma^2 unless told otherwise; here that is "
        '`weighting = "diffusers-compat"`, and the default is the plain velocity error.',
        "The example scripts train with 77 T5 tokens where the pipeline uses 256 at inference.",
    ),
    whole_file=WholeFile(
        parts={
            "transformer": (Held(whole_file.MODEL, probes),),
            "vae": whole_file.VAES,
            "text_encoder": whole_file.TEXTS["clip_l"],
            "text_encoder_2": whole_file.TEXTS["clip_g"],
            "text_encoder_3": whole_file.TEXTS["t5"],
        },
        usual=("transformer", "vae"),
    ),
)
