"""Z-Image (arXiv 2511.22699): one stream of text and picture, with Qwen3 4B.

Time runs the other way in the model: 0 is noise, 1 the picture, and it predicts the velocity
towards the picture. Turbo is distilled to eight steps without guidance; training undoes some of
that. Configurations are those of the published folders; a key that is absent has its class's
default. Parameter counts are of those classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compiler.families import flux, whole_file
from compiler.families.card import Configs, FamilyCard, KnownModel, TokenShift
from compiler.families.whole_file import Held, WholeFile

QWEN3_4B: dict[str, Any] = {  # Qwen/Qwen3-4B, the decoder without its head
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
}
TRANSFORMER: dict[str, Any] = {
    "_class_name": "ZImageTransformer2DModel",
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
PARAMETERS = {
    "text_encoder": 4_022_468_096,
    "transformer": 6_154_908_736,
    "vae": flux.PARAMETERS["vae"],
}


def _known(base: str, shift: float, **usual: Any) -> KnownModel:
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "shift": shift,
    }
    return KnownModel(
        base=base,
        resolution=1024,
        configs={
            "scheduler": scheduler,
            "text_encoder": QWEN3_4B,
            "transformer": TRANSFORMER,
            "vae": flux.VAE,
        },
        parameters=PARAMETERS,
        **usual,
    )


STACKS = r"(layers|noise_refiner|context_refiner)\.\d+"
ATTENTION = rf"{STACKS}\.attention\.(to_[qkv]|to_out\.0)"


def _embedding_shapes(configs: Configs, max_length: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (max_length, int(configs["transformer"]["cap_feat_dim"]))}


def _runs(config: Mapping[str, Any]) -> list[int]:
    """Blocks that refine noise, those that refine text, and those of both, as they are run."""
    refiners = int(config.get("n_refiner_layers", 0))
    return [refiners, refiners, int(config.get("n_layers", 0))]


def _shortened(config: Mapping[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    assert counts[0] == counts[1], "as many blocks refine text as noise"
    return {**config, "n_refiner_layers": counts[0], "n_layers": counts[2]}


def probes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """What tells a transformer of this configuration by the shapes of its tensors, under the names
    of ComfyUI's files (see `runtime.export.z_image`)."""
    width, layers = int(config["dim"]), int(config["n_layers"])
    return {
        "cap_embedder.1.weight": (width, int(config["cap_feat_dim"])),
        "layers.0.adaLN_modulation.0.weight": (4 * width, min(width, 256)),
        f"layers.{layers - 1}.attention.qkv.weight": (3 * width, width),
        f"layers.{layers}.attention.qkv.weight": None,
    }


CARD = FamilyCard(
    name="z_image",
    title="Z-Image",
    pipeline="ZImagePipeline",
    components={
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen3Model",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
    },
    text_encoders=("text_encoder",),
    trained_component="transformer",
    blocks=("noise_refiner", "context_refiner", "layers"),
    depth=lambda config: sum(_runs(config)),
    runs=_runs,
    shortened=_shortened,
    latent_channels_key="latent_channels",
    moments=("mean", "std"),
    embedding_shapes=_embedding_shapes,
    unpadded_text=True,
    prompt_length=512,
    instruction=(),
    default_resolution=1024,
    sampling="logit-normal",
    default_shift=1.0,
    # The defaults in ZImagePipeline.__call__.
    token_shift=TokenShift(base_tokens=256, max_tokens=4096, base_shift=0.5, max_shift=1.15),
    prediction="flow",
    time="1 - sigma",
    guidance=5.0,
    inference_steps=50,
    target_sets={
        # The reference script's: also in the blocks that refine text and noise.
        "attention": (ATTENTION,),
        "all-linear": (
            ATTENTION,
            rf"{STACKS}\.feed_forward\.w[123]",
            r"(layers|noise_refiner)\.\d+\.adaLN_modulation\.0",
        ),
    },
    default_targets="attention",
    fp16_overflows=True,
    masked_attention=True,  # of prompts of different lengths
    not_compiled="it is given prompts one by one, each as long as it is, and every length of a "
    "batch would be a graph of its own",
    attention="all attention",
    known=(
        _known("Tongyi-MAI/Z-Image", 6.0, guidance=4.0),
        _known(
            "Tongyi-MAI/Z-Image-Turbo",
            3.0,
            guidance=0.0,
            inference_steps=9,
            undistilled="Tongyi-MAI/Z-Image",
        ),
    ),
    patch_key="all_patch_size",
    traps=(
        "Prompts go through Qwen3's chat template as in the pipeline, negative and empty ones too.",
        "Guidance is counted from 0: the pipeline adds `guidance` times the difference, so that 1 "
        "here is 2 elsewhere, and 0 turns it off.",
        "Long training of Turbo undoes its distillation: pictures in eight steps get worse.",
        "Activations overflow in fp16.",
    ),
    whole_file=WholeFile(
        parts={
            # ComfyUI's split files, and what other programs write.
            "transformer": (Held("", probes), Held(whole_file.MODEL, probes)),
            "vae": whole_file.VAES,
        },
        usual=("transformer",),
    ),
)
