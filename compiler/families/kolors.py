"""Kolors (Kwai-Kolors, 2024): SDXL's UNet with ChatGLM3, for Chinese and English prompts.

Configurations are those of the published folder, as Diffusers stores them; a key that is absent has
its class's default. Parameter counts are of those classes.
"""

from __future__ import annotations

from typing import Any

from compiler.families import sd, sdxl, unet
from compiler.families.card import Configs, FamilyCard, KnownModel

CHATGLM: dict[str, Any] = {  # THUDM/chatglm3-6b-base
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "seq_length": 32768,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "layernorm_epsilon": 1e-05,
    "rmsnorm": True,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "bias_dropout_fusion": True,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "apply_query_key_layer_scaling": True,
    "attention_softmax_in_fp32": True,
    "fp32_residual_connection": False,
    "original_rope": True,
    "use_cache": True,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
UNET: dict[str, Any] = {
    **sdxl.UNET,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "projection_class_embeddings_input_dim": 5632,
}
SCHEDULER: dict[str, Any] = {**sdxl.SCHEDULER, "beta_end": 0.014, "num_train_timesteps": 1100}


def _embedding_shapes(configs: Configs, max_length: int) -> dict[str, tuple[int, ...]]:
    width = int(configs["text_encoder"]["hidden_size"])
    return {"encoder_hidden_states": (max_length, width), "text_embeds": (width,)}


CARD = FamilyCard(
    name="kolors",
    own_config=lambda config: unet.told(config) == "sizes, by a language model",
    title="Kolors",
    pipeline="KolorsPipeline",
    components={
        "scheduler": "EulerDiscreteScheduler",
        "text_encoder": "ChatGLMModel",
        "tokenizer": "ChatGLMTokenizer",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    },
    text_encoders=("text_encoder",),
    trained_component="unet",
    blocks=unet.BLOCKS,
    depth=unet.depth,
    runs=unet.runs,
    places=unet.places,
    shortened=unet.shortened,
    latent_channels_key="latent_channels",
    moments=("mean", "std"),
    embedding_shapes=_embedding_shapes,
    unpadded_text=False,
    prompt_length=256,
    instruction=(),
    default_resolution=1024,
    sampling="uniform",
    default_shift=1.0,
    token_shift=None,
    prediction="epsilon",
    timesteps=1100,
    guidance=5.0,
    inference_steps=50,
    target_sets=unet.TARGET_SETS,
    default_targets="attention",
    fp16_overflows=False,
    overflowing=("vae",),
    masked_attention=False,
    cross_attention=("attn2",),
    attention="self- and cross-attention",
    known=(
        KnownModel(
            base="Kwai-Kolors/Kolors-diffusers",
            resolution=1024,
            configs={
                "scheduler": SCHEDULER,
                "text_encoder": CHATGLM,
                "unet": UNET,
                "vae": sdxl.VAE,
            },
            parameters={
                "text_encoder": 6_243_584_000,
                "unet": 2_579_458_820,
                "vae": sd.VAE_PARAMETERS,
            },
        ),
    ),
    size_conditions=True,
    traps=(
        sdxl.OVERFLOW,
        "Its table has 1100 noise levels, not 1000: a scheduler made for SDXL samples it wrongly.",
        "An empty negative prompt is encoded: the pipeline can't make zeros of it.",
    ),
)
