"""Flux.2 dev (Black Forest Labs, 2025): klein's elder, larger, and distilled from guidance.

It is told a guidance scale, in training too. Its text encoder is Mistral Small 3.2 with its eyes,
which here see nothing; prompts are put in a conversation whose first message is the pipeline's
own. Configurations are those of the published folders; a key that is absent has its class's
default. Parameter counts are of those classes.
"""

from __future__ import annotations

from typing import Any

from attrs import evolve

from compiler.families import flux, flux2
from compiler.families.card import KnownModel

MISTRAL: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "image_token_index": 10,
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "vision_feature_layer": -1,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "hidden_act": "silu",
        "image_size": 1540,
        "patch_size": 14,
        "num_channels": 3,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
    },
}
TRANSFORMER: dict[str, Any] = {
    **flux2.TRANSFORMER,
    "num_layers": 8,
    "num_single_layers": 48,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "guidance_embeds": True,
}
KNOWN = KnownModel(
    base="black-forest-labs/FLUX.2-dev",
    resolution=1024,
    configs={
        "scheduler": {**flux.SCHEDULER, **flux.BY_SIZE},
        "text_encoder": MISTRAL,
        "transformer": TRANSFORMER,
        "vae": flux2.VAE,
    },
    parameters={
        "text_encoder": 24_011_361_280,
        "transformer": 32_223_281_152,
        "vae": 84_046_115,
    },
)

CARD = evolve(
    flux2.CARD,
    name="flux2_dev",
    own_config=lambda config: bool(config.get("guidance_embeds", True)),
    title="Flux.2 dev",
    pipeline="Flux2Pipeline",
    pipeline_options={},
    components={
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Mistral3ForConditionalGeneration",
        "tokenizer": "PreTrainedTokenizerFast",  # of its processor, which also knows pictures
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
    },
    known=(KNOWN,),
    traps=(
        "It is trained at guidance 1 and sampled at 4: told more in training, a LoRA comes out "
        "weak at inference.",
        "The transformer has 32 billion parameters and the text encoder 24: quantise the first, "
        "and the second too where prompts are encoded on a card.",
        flux2.CARD.traps[-1],
    ),
    few_steps_key="",
    few_steps=0,
    guidance_key="guidance_embeds",
    negative_prompts=False,
)
