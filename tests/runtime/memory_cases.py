"""Candidates for the memory tests: published models, whole or made small."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal

from compiler.families import FAMILIES
from compiler.memory import Candidate
from compiler.noise import noise_table
from compiler.optimizers import OPTIMIZERS
from compiler.plan import (
    Adapter,
    Component,
    Dtype,
    Layout,
    Model,
    Objective,
    Optimizer,
    Precision,
    Text,
)

SANA = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
SD35_LARGE = "stabilityai/stable-diffusion-3.5-large"
IMAGE_ATTENTION = (r".*\.attn\.to_[qkv]", r".*\.attn\.to_out\.0")

# Small, but with every kind of layer of the large ones; head sizes that all kernels take.
SMALL: dict[str, dict[str, Any]] = {
    "sana": {
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 64,
        "caption_channels": 48,
    },
    "sd3": {
        "num_layers": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "caption_projection_dim": 96,
        "joint_attention_dim": 80,
        "pooled_projection_dim": 40,
        "pos_embed_max_size": 64,
        "dual_attention_layers": [0, 1],
        "qk_norm": "rms_norm",
    },
}
# Of the other components; every kind of layer of the published ones.
SMALL_PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "sana": {
        "text_encoder": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "vocab_size": 128,
        },
        "vae": {
            "attention_head_dim": 8,
            "encoder_block_out_channels": [8, 8, 16, 16, 32, 32],
            "decoder_block_out_channels": [8, 8, 16, 16, 32, 32],
        },
    },
    "sd3": {
        "text_encoder": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "projection_dim": 16,
            "vocab_size": 128,
        },
        "text_encoder_2": {
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "projection_dim": 24,
            "vocab_size": 128,
        },
        "text_encoder_3": {
            "vocab_size": 128,
            "d_model": 80,
            "d_kv": 8,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
        },
        "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
    },
}
BASES = {"sana": SANA, "sd3": "stabilityai/stable-diffusion-3.5-medium"}


def known(base: str, parts: Mapping[str, Mapping[str, Any]] | None = None, **trained: Any) -> Model:
    """A published model as a plan states it; `trained` overrides the configuration of the trained
    component, `parts` that of others."""
    card, entry = next((c, k) for c in FAMILIES.values() for k in c.known if k.base == base)
    configs = {name: dict(config) for name, config in entry.configs.items()}
    configs[card.trained_component].update(trained)
    for name, changes in (parts or {}).items():
        configs[name].update(changes)
    return Model(
        family=card.name,
        base=base,
        local=False,
        revision="",
        init="pretrained",
        trained_component=card.trained_component,
        components=tuple(
            Component(
                name=name,
                class_name=class_name,
                parameters=entry.parameters.get(name, 0),
                dtype="float32" if name == "vae" else "bfloat16",
                trained=name == card.trained_component,
            )
            for name, class_name in card.components.items()
        ),
        configs={name: json.dumps(config) for name, config in configs.items()},
    )


def candidate(
    model: Model,
    *,
    rank: int = 0,
    targets: tuple[str, ...] = (),
    dropout: float = 0.0,
    compute: Dtype = "bfloat16",
    trained: Dtype = "float32",
    tokens: int = 0,
    optimizer: str = "adamw",
    fused: bool = True,
    max_grad_norm: float = 1.0,
    ema: bool = False,
    accumulate: int = 1,
    checkpointing: int = 0,
    shapes: tuple[tuple[int, int, int], ...] = ((1024, 1024, 1),),
    layout: Layout | None = None,
    pictures: tuple[tuple[int, int], ...] = (),
    guidance: float = 4.5,
    evaluated: tuple[tuple[int, int, int], ...] = (),
    device: Literal["cpu", "cuda"] = "cuda",
) -> Candidate:
    """A step to simulate; `rank` 0 is a full fine-tune, `tokens` 0 the family's prompt length."""
    card = FAMILIES[model.family]
    trained_config = json.loads(model.configs[card.trained_component])
    adapter = Adapter(
        kind="lora",
        rank=rank,
        alpha=rank,
        dropout=dropout,
        init="gaussian",
        targets=targets or card.target_sets[card.default_targets],
    )
    return Candidate(
        model=model,
        adapter=adapter if rank else None,
        precision=Precision(compute=compute, weights=compute, trained=trained, cache="float32"),
        text=Text(max_length=tokens or card.prompt_length, instruction=()),
        objective=Objective(
            prediction=card.prediction,
            table=noise_table(card, json.loads(model.configs["scheduler"])),
            sampling="logit-normal",
            logit_mean=0.0,
            logit_std=1.0,
            mode_scale=1.29,
            shift=3.0,
            loss="mse",
            weighting="none",
            guidance=1.0 if card.told_guidance(trained_config) else None,
        ),
        optimizer=Optimizer(
            name=optimizer,
            lr=1e-4,
            arguments=dict(OPTIMIZERS[optimizer].defaults),
            fused=fused,
        ),
        max_grad_norm=max_grad_norm,
        ema_on_device=ema,
        accumulate=accumulate,
        layout=layout or Layout(activation_checkpointing=checkpointing),
        pictures=pictures,
        guidance=guidance,
        evaluated=evaluated,
        shapes=shapes,
        device=device,
    )


def small(family: str, **overrides: Any) -> Candidate:
    """A small model of `family` on the CPU at 256 pixels; see `candidate` for the rest."""
    given: dict[str, Any] = {
        "device": "cpu",
        "shapes": ((256, 256, 2),),
        "tokens": 32,
        "trained": overrides.get("compute", "float32"),
        "compute": "float32",
        **overrides,
    }
    if family in BASES:
        return candidate(known(BASES[family], SMALL_PARTS[family], **SMALL[family]), **given)
    tiny = import_module(f"tests.runtime.tinies.{family}")
    return candidate(known(tiny.BASE, tiny.PARTS, **tiny.SMALL), **given)
