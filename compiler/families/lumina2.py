"""Lumina-Image 2.0 (arXiv 2503.21758): text and picture in one stream, with Gemma-2.

Time runs the other way in the model: 0 is noise, 1 the picture, and it predicts the velocity
towards the picture. Configurations are those of Diffusers' `convert_lumina_to_diffusers.py`, which
made the published folder; a key that is absent has its class's default. Parameter counts are of
those classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compiler.families import flux, sana, whole_file
from compiler.families.card import Configs, FamilyCard, KnownModel, counted
from compiler.families.whole_file import Held, WholeFile

SYSTEM = (  # Lumina2Pipeline's `system_prompt`
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts."
)
TRANSFORMER: dict[str, Any] = {
    "_class_name": "Lumina2Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "hidden_size": 2304,
    "num_layers": 26,
    "num_refiner_layers": 2,
    "num_attention_heads": 24,
    "num_kv_heads": 8,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-05,
    "scaling_factor": 1.0,
    "axes_dim_rope": [32, 32, 32],
    "axes_lens": [300, 512, 512],
    "cap_feat_dim": 2304,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 6.0,
    "use_dynamic_shifting": False,
}
KNOWN = KnownModel(
    base="Alpha-VLLM/Lumina-Image-2.0",
    resolution=1024,
    configs={
        "scheduler": SCHEDULER,
        "text_encoder": sana.TEXT_ENCODER,
        "transformer": TRANSFORMER,
        "vae": flux.VAE,
    },
    parameters={
        "text_encoder": sana.PARAMETERS["text_encoder"],
        "transformer": 2_609_769_152,
        "vae": flux.PARAMETERS["vae"],
    },
)

STACKS = r"(layers|noise_refiner|context_refiner)\.\d+"
ATTENTION = rf"{STACKS}\.attn\.(to_[qkv]|to_out\.0)"


def _embedding_shapes(configs: Configs, max_length: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (max_length, int(configs["transformer"]["cap_feat_dim"]))}


def _shortened(config: Mapping[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    return {**config, "num_layers": counts[0]}


def probes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """What tells a transformer of this configuration by the shapes of its tensors, under the names
    that were published (see `runtime.export.nextdit`)."""
    width, layers = int(config["hidden_size"]), int(config["num_layers"])
    heads = int(config["num_attention_heads"])
    fewer = width // heads * int(config.get("num_kv_heads") or heads)
    return {
        "cap_embedder.1.weight": (width, int(config["cap_feat_dim"])),
        "layers.0.adaLN_modulation.1.weight": (4 * width, min(width, 1024)),
        f"layers.{layers - 1}.attention.qkv.weight": (width + 2 * fewer, width),
        f"layers.{layers}.attention.qkv.weight": None,
    }


CARD = FamilyCard(
    name="lumina2",
    title="Lumina-Image 2.0",
    pipeline="Lumina2Pipeline",
    components={
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Gemma2Model",
        "tokenizer": "GemmaTokenizer",
        "transformer": "Lumina2Transformer2DModel",
        "vae": "AutoencoderKL",
    },
    text_encoders=("text_encoder",),
    trained_component="transformer",
    blocks=("layers",),  # Diffusers recomputes none of the four blocks that refine
    depth=counted("num_layers"),
    runs=lambda config: [int(config.get("num_layers", 0))],
    shortened=_shortened,
    latent_channels_key="latent_channels",
    moments=("mean", "std"),
    embedding_shapes=_embedding_shapes,
    unpadded_text=True,
    prompt_length=256,
    instruction=(SYSTEM,),
    default_resolution=1024,
    sampling="logit-normal",
    default_shift=1.0,
    token_shift=None,  # the pipeline counts channels in place of tokens; the base states a shift
    prediction="flow",
    time="1 - sigma",
    guidance=4.0,
    inference_steps=30,
    target_sets={
        # The reference script's: also in the blocks that refine text and noise.
        "attention": (ATTENTION,),
        "all-linear": (
            ATTENTION,
            rf"{STACKS}\.feed_forward\.linear_[123]",
            r"(layers|noise_refiner)\.\d+\.norm1\.linear",
        ),
    },
    default_targets="attention",
    fp16_overflows=True,
    masked_attention=True,  # of prompts of different lengths
    attention="all attention",
    known=(KNOWN,),
    traps=(
        "Lumina2Pipeline puts a system prompt before each prompt, and none before negative ones; "
        "training does the same. It counts among the 256 tokens.",
        "The example script applies the shift to the picture's share, so that it trains mostly at "
        "little noise; here noise levels are shifted as the pipeline samples.",
        "Activations overflow in fp16, Gemma-2's and the transformer's.",
    ),
    whole_file=WholeFile(
        parts={
            # ComfyUI's split files, and those that also hold an autoencoder.
            "transformer": (Held("", probes), Held(whole_file.MODEL, probes)),
            "vae": whole_file.VAES,
        },
        usual=("transformer",),
    ),
)
