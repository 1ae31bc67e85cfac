"""Flux.2 klein (Black Forest Labs, 2026): double and single blocks that share their modulation.

Those to train are the bases, which are not distilled: what is learned on them serves the distilled
models of four steps as well. Its latents are normalised by statistics that the autoencoder brings,
square by square of 2 x 2. Configurations are those of the published folders; a key that is absent
has its class's default. Parameter counts are of those classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compiler.families import flux, whole_file
from compiler.families.card import Configs, FamilyCard, KnownModel, TokenShift, counted
from compiler.families.whole_file import Held, WholeFile

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLFlux2",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 32,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "batch_norm_eps": 1e-4,
    "patch_size": [2, 2],
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
QWEN3_4B = {
    **QWEN3,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "tie_word_embeddings": True,
}
QWEN3_8B = {
    **QWEN3,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
TRANSFORMER: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel",
    "patch_size": 1,
    "in_channels": 128,
    "attention_head_dim": 128,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
    "eps": 1e-06,
    "guidance_embeds": False,
}
SMALL = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
}
LARGE = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
BASE_4B = "black-forest-labs/FLUX.2-klein-base-4B"
BASE_9B = "black-forest-labs/FLUX.2-klein-base-9B"
FOUR = (4_022_468_096, 3_875_544_576, 84_046_115)  # text encoder, transformer, vae
NINE = (8_190_735_360, 9_078_581_248, 84_046_115)


def _known(
    base: str,
    shape: Mapping[str, Any],
    encoder: Mapping[str, Any],
    *parameters: int,
    undistilled: str = "",
) -> KnownModel:
    names = ("text_encoder", "transformer", "vae")
    return KnownModel(
        base=base,
        resolution=1024,
        configs={
            "scheduler": {**flux.SCHEDULER, **flux.BY_SIZE},
            "text_encoder": encoder,
            "transformer": {**TRANSFORMER, **shape},
            "vae": VAE,
        },
        parameters=dict(zip(names, parameters, strict=True)),
        index={"is_distilled": bool(undistilled)},
        undistilled=undistilled,
    )


IMAGE = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)"
TEXT = r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)"
SINGLE = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
FEED_FORWARD = r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)"


def _embedding_shapes(configs: Configs, max_length: int) -> dict[str, tuple[int, ...]]:
    return {
        "encoder_hidden_states": (max_length, int(configs["transformer"]["joint_attention_dim"]))
    }


def probes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """What tells a transformer of this configuration by the shapes of its tensors, under the names
    that were published (see `runtime.export.bfl2`)."""
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    inner = int(width * float(config.get("mlp_ratio", 3.0)))
    double, single = flux.runs(config)
    told = (width, 256) if config.get("guidance_embeds", True) else None
    return {
        "img_in.weight": (width, int(config["in_channels"])),
        "txt_in.weight": (width, int(config["joint_attention_dim"])),
        "guidance_in.in_layer.weight": told,
        f"double_blocks.{double - 1}.img_attn.qkv.weight": (3 * width, width),
        f"double_blocks.{double}.img_attn.qkv.weight": None,
        f"single_blocks.{single - 1}.linear2.weight": (width, width + inner),
        f"single_blocks.{single}.linear2.weight": None,
    }


CARD = FamilyCard(
    name="flux2",
    own_config=lambda config: not config.get("guidance_embeds", True),
    title="Flux.2 klein",
    pipeline="Flux2KleinPipeline",
    pipeline_options={"is_distilled": False},
    components={
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen3ForCausalLM",
        "tokenizer": "Qwen2TokenizerFast",
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
    },
    text_encoders=("text_encoder",),
    trained_component="transformer",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    depth=counted("num_layers", "num_single_layers"),
    runs=flux.runs,
    shortened=flux.shortened,
    latent_channels_key="latent_channels",
    moments=("mean",),
    embedding_shapes=_embedding_shapes,
    unpadded_text=False,
    prompt_length=512,
    instruction=(),
    default_resolution=1024,
    sampling="logit-normal",
    default_shift=3.0,
    # Flux2KleinPipeline's `compute_empirical_mu`, whatever its scheduler says: on the line for 50
    # steps up to 4300 tokens (16 x 16 pixels each), and above on one for any number of steps.
    token_shift=TokenShift(
        base_tokens=256,
        max_tokens=4096,
        base_shift=1.6216074698534737,
        max_shift=2.0233511571292637,
        stated=False,
        far=(4300, 0.00016927, 0.45666666),
    ),
    prediction="flow",
    guidance=4.0,
    inference_steps=50,
    target_sets={
        # What `to_q, to_k, to_v, to_out.0` means in other trainers: the double blocks alone.
        "attention-image": (IMAGE,),
        # Single blocks have their attention and the start of the feed-forward in one layer.
        "attention": (IMAGE, TEXT, SINGLE),
        "all-linear": (IMAGE, TEXT, SINGLE, FEED_FORWARD),
    },
    default_targets="attention",
    fp16_overflows=False,
    masked_attention=False,
    attention="all attention",
    known=(
        _known(BASE_4B, SMALL, QWEN3_4B, *FOUR),
        _known(BASE_9B, LARGE, QWEN3_8B, *NINE),
        _known("black-forest-labs/FLUX.2-klein-4B", SMALL, QWEN3_4B, *FOUR, undistilled=BASE_4B),
        _known("black-forest-labs/FLUX.2-klein-9B", LARGE, QWEN3_8B, *NINE, undistilled=BASE_9B),
    ),
    traps=(
        "The distilled models (FLUX.2-klein-4B, -9B) draw in four steps, which training undoes: "
        "train the base of the same size, and load its LoRA there.",
        "The pipeline shifts noise levels far more than its scheduler's configuration says; here "
        "training follows the pipeline, at 50 steps. Above 4300 tokens (1024 x 1024 pixels have "
        "4096) it shifts them much less at once.",
    ),
    packed=2,
    few_steps_key="is_distilled",
    few_steps=4,
    whole_file=WholeFile(
        # As published, and as other programs write them.
        parts={"transformer": (Held("", probes), Held(whole_file.MODEL, probes))},
        usual=("transformer",),
    ),
)
