"""Flux.1 (Black Forest Labs, 2024): a flow of double and single blocks over packed latents.

FLUX.1 dev is distilled from guidance: it is told a guidance scale, in training too. FLUX.1 schnell
is distilled to four steps and is told none; training undoes some of that. Configurations are those
of the published folders; a key that is absent has its class's default. Parameter counts are of
those classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compiler.families import sd, sd3, whole_file
from compiler.families.card import Configs, FamilyCard, KnownModel, TokenShift, counted
from compiler.families.whole_file import Held, WholeFile

VAE: dict[str, Any] = {**sd3.VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}
TRANSFORMER: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
PARAMETERS = {
    "text_encoder": 123_060_480,
    "text_encoder_2": 4_762_310_656,
    "vae": 83_819_683,
}


def _known(
    base: str, scheduler: Mapping[str, Any], parameters: int, *, told: bool, **usual: Any
) -> KnownModel:
    return KnownModel(
        base=base,
        resolution=1024,
        configs={
            "scheduler": {**SCHEDULER, **scheduler},
            "text_encoder": sd.CLIP_L,
            "text_encoder_2": sd3.T5_XXL,
            "transformer": {**TRANSFORMER, "guidance_embeds": told},
            "vae": VAE,
        },
        parameters={**PARAMETERS, "transformer": parameters},
        **usual,
    )


BY_SIZE = {"shift": 3.0, "use_dynamic_shifting": True}
ONE_FOR_ALL = {"shift": 1.0, "use_dynamic_shifting": False}

BLOCKS = r"(single_)?transformer_blocks\.\d+"
IMAGE = rf"{BLOCKS}\.attn\.(to_[qkv]|to_out\.0)"
TEXT = r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)"
FEED_FORWARD = r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
SINGLE = r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
MODULATION = (
    r"transformer_blocks\.\d+\.norm1(_context)?\.linear",
    r"single_transformer_blocks\.\d+\.norm\.linear",
)


def _embedding_shapes(configs: Configs, max_length: int) -> dict[str, tuple[int, ...]]:
    """T5's tokens, and CLIP's pooled state."""
    transformer = configs["transformer"]
    return {
        "encoder_hidden_states": (max_length, int(transformer["joint_attention_dim"])),
        "pooled_projections": (int(transformer["pooled_projection_dim"]),),
    }


def runs(config: Mapping[str, Any]) -> list[int]:
    """Double blocks, then single ones."""
    return [int(config.get("num_layers", 0)), int(config.get("num_single_layers", 0))]


def shortened(config: Mapping[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """The configuration with so many double and single blocks."""
    double, single = counts
    return {**config, "num_layers": double, "num_single_layers": single}


def probes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """What tells a transformer of this configuration by the shapes of its tensors, under the names
    that were published (see `runtime.export.bfl`)."""
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    double, single = runs(config)
    told = (width, 256) if config.get("guidance_embeds") else None
    return {
        "img_in.weight": (width, int(config["in_channels"])),
        "txt_in.weight": (width, int(config["joint_attention_dim"])),
        "vector_in.in_layer.weight": (width, int(config["pooled_projection_dim"])),
        "guidance_in.in_layer.weight": told,
        f"double_blocks.{double - 1}.img_attn.qkv.weight": (3 * width, width),
        f"double_blocks.{double}.img_attn.qkv.weight": None,
        f"single_blocks.{single - 1}.linear2.weight": (width, 5 * width),
        f"single_blocks.{single}.linear2.weight": None,
    }


CARD = FamilyCard(
    name="flux",
    title="Flux.1",
    pipeline="FluxPipeline",
    components={
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5TokenizerFast",
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
    },
    text_encoders=("text_encoder", "text_encoder_2"),
    trainable_encoders=("text_encoder",),
    embedding_keys={"text_encoder": ""},
    kohya_encoders={"text_encoder": "lora_te1"},
    trained_component="transformer",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    depth=counted("num_layers", "num_single_layers"),
    runs=runs,
    shortened=shortened,
    latent_channels_key="latent_channels",
    moments=("mean", "std"),
    embedding_shapes=_embedding_shapes,
    unpadded_text=False,
    prompt_length=512,
    instruction=(),
    default_resolution=1024,
    sampling="logit-normal",
    default_shift=1.0,
    # The defaults in FluxPipeline.__call__.
    token_shift=TokenShift(base_tokens=256, max_tokens=4096, base_shift=0.5, max_shift=1.15),
    prediction="flow",
    guidance=3.5,
    inference_steps=28,
    target_sets={
        # What `to_q, to_k, to_v, to_out.0` means in other trainers.
        "attention-image": (IMAGE,),
        "attention": (IMAGE, TEXT),
        # The reference script's default.
        "attention-feed-forward": (IMAGE, TEXT, FEED_FORWARD),
        # As LoRAs for other programs usually have it: every layer of the blocks.
        "all-linear": (IMAGE, TEXT, FEED_FORWARD, SINGLE, *MODULATION),
    },
    default_targets="attention-feed-forward",
    fp16_overflows=False,
    masked_attention=False,
    attention="all attention",
    known=(
        _known("black-forest-labs/FLUX.1-dev", BY_SIZE, 11_901_408_320, told=True),
        _known(
            "black-forest-labs/FLUX.1-Krea-dev",
            BY_SIZE,
            11_901_408_320,
            told=True,
            guidance=4.5,
        ),
        _known(
            "black-forest-labs/FLUX.1-schnell",
            ONE_FOR_ALL,
            11_891_178_560,
            told=False,
            prompt_length=256,
            guidance=0.0,
            inference_steps=4,
            undistilled="black-forest-labs/FLUX.1-dev",
        ),
    ),
    traps=(
        "dev is trained at guidance 1 and sampled at 3.5: told more in training, a LoRA comes out "
        "weak at inference.",
        "The example scripts train dev without the shift that its pipeline samples with; here it "
        "follows each picture's size, as in the pipeline.",
        "Long training of schnell undoes its distillation: pictures in four steps get worse.",
    ),
    packed=2,
    guidance_key="guidance_embeds",
    negative_prompts=False,
    whole_file=WholeFile(
        parts={
            # As published, and as other programs write whole models.
            "transformer": (Held("", probes), Held(whole_file.MODEL, probes)),
            "vae": whole_file.VAES,
            "text_encoder": whole_file.TEXTS["clip_l"],
            "text_encoder_2": whole_file.TEXTS["t5"],
        },
        usual=("transformer",),
    ),
)
