"""How a family's models lie in one file: names of tensors and, by configuration, shapes of some.

A file's header tells by these which family it is of, how large, and which components it holds.
Sources: the publishers' own code, named beside each layout in `runtime.export`, and the names that
`diffusers.loaders.single_file_utils` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrs import frozen

Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, Any]
Probes = Callable[[Config], Mapping[str, tuple[int, ...] | None]]
"""Of a component's configuration: some tensors' shapes; None of one that must not be there."""


@frozen
class Held:
    """One layout of a component: what its tensors' names begin with, and how to know it."""

    prefix: str
    probes: Probes


@frozen(kw_only=True)
class WholeFile:
    """The layouts of a family's files."""

    parts: Mapping[str, tuple[Held, ...]]  # component -> the layouts that it may be in
    usual: tuple[str, ...]
    """Components that every published file holds; others come from the rest without a word."""


def misfit(held: Held, config: Config, shapes: Shapes) -> str:
    """Why a file of `shapes` does not hold this layout of a component; "" if it does."""
    for name, wanted in held.probes(config).items():
        found = shapes.get(held.prefix + name)
        if wanted is None and found is not None:
            return f"it has `{held.prefix}{name}`, which a model of this size has not"
        if wanted is not None and found is None:
            return f"it has no `{held.prefix}{name}`"
        if wanted is not None and found != wanted:
            return f"`{held.prefix}{name}` is {_spelt(found)}, not {_spelt(wanted)}"
    return ""


def located(
    whole: WholeFile, name: str, configs: Mapping[str, Config], shapes: Shapes
) -> tuple[str, str]:
    """The prefix of a component in a file of `shapes`; or why it is not there."""
    why = "no layout of it is known"
    for layout in whole.parts.get(name, ()):
        try:
            found = misfit(layout, configs[name], shapes)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            found = f"its configuration can't be read: {type(error).__name__}: {error}"
        if not found:
            return layout.prefix, ""
        mine = any(key.startswith(layout.prefix) for key in shapes) if layout.prefix else False
        why = found if mine or why.startswith("no layout") else why
    return "", why


def held_in(whole: WholeFile, configs: Mapping[str, Config], shapes: Shapes) -> tuple[str, ...]:
    """The components of these configurations that a file of `shapes` holds."""
    names = [name for name in whole.parts if name in configs]
    return tuple(name for name in names if not located(whole, name, configs, shapes)[1])


def _spelt(shape: tuple[int, ...] | None) -> str:
    return " x ".join(map(str, shape or ()))


def vae(config: Config) -> Mapping[str, tuple[int, ...] | None]:
    """An AutoencoderKL under the names of latent diffusion's own code."""
    widths, latents = config["block_out_channels"], int(config["latent_channels"])
    channels = int(config.get("in_channels", 3))
    return {
        "encoder.conv_in.weight": (widths[0], channels, 3, 3),
        "decoder.conv_in.weight": (widths[-1], latents, 3, 3),
        f"encoder.down.{len(widths)}.block.0.conv1.weight": None,
    }


def clip(config: Config) -> Mapping[str, tuple[int, ...] | None]:
    """A CLIP under the names of transformers."""
    width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    inner = int(config["intermediate_size"])
    return {
        "text_model.embeddings.position_embedding.weight": (_positions(config), width),
        f"text_model.encoder.layers.{layers - 1}.mlp.fc1.weight": (inner, width),
        f"text_model.encoder.layers.{layers}.mlp.fc1.weight": None,
    }


def open_clip(config: Config) -> Mapping[str, tuple[int, ...] | None]:
    """A CLIP under OpenCLIP's names. Files may hold one layer more than the pipeline uses."""
    width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    return {
        "positional_embedding": (_positions(config), width),
        f"transformer.resblocks.{layers - 1}.mlp.c_fc.weight": (
            int(config["intermediate_size"]),
            width,
        ),
        f"transformer.resblocks.{layers + 1}.mlp.c_fc.weight": None,
    }


def _positions(config: Config) -> int:
    return int(config.get("max_position_embeddings", 77))


def t5(config: Config) -> Mapping[str, tuple[int, ...] | None]:
    """A T5 encoder under the names of transformers."""
    width, layers = int(config["d_model"]), int(config["num_layers"])
    inner = int(config["num_heads"]) * int(config["d_kv"])
    return {
        "shared.weight": (int(config["vocab_size"]), width),
        f"encoder.block.{layers - 1}.layer.0.SelfAttention.q.weight": (inner, width),
        f"encoder.block.{layers}.layer.0.SelfAttention.q.weight": None,
    }


MODEL = "model.diffusion_model."
VAES = (Held("first_stage_model.", vae), Held("vae.", vae))
TEXTS: Mapping[str, tuple[Held, ...]] = {
    "clip_l": (Held("text_encoders.clip_l.transformer.", clip),),
    "clip_g": (Held("text_encoders.clip_g.transformer.", clip),),
    "t5": (Held("text_encoders.t5xxl.transformer.", t5),),
}
"""Text encoders of files since Stable Diffusion 3."""

MARKS: Mapping[str, tuple[str, str, object]] = {
    "v_pred": ("it predicts v", "prediction_type", "v_prediction"),
    "ztsnr": ("its noise ends without a signal", "rescale_betas_zero_snr", True),
}
"""Empty or small tensors by which files say what a model is trained for (ComfyUI,
comfy/supported_models.py): what it means, and what a scheduler's configuration then says."""
