"""The layouts of files that other programs read: which there are for which family, and who laid
them down. Imports no torch, so that what does not exist is refused at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

Format = Literal["diffusers", "kohya", "comfyui"]
FORMATS: tuple[Format, ...] = ("diffusers", "kohya", "comfyui")
Config = Mapping[str, Any]

LORA: Mapping[Format, Mapping[str, str]] = {
    "kohya": {
        # `lora_unet_` and the MMDiT's module name, query, key and value in one, with `.alpha`.
        # ComfyUI reads them as well.
        "sd3": "sd-scripts, networks/lora_sd3.py",
    },
    "comfyui": {
        # `transformer.` and Diffusers' module name. Alpha is asked for beside each layer, which
        # Diffusers refuses, so the strength stands in the weights: both load the same.
        "sd3": "ComfyUI, comfy/lora.py (model_lora_keys_unet) and comfy/utils.py",
    },
}
"""LoRA keys: format -> family -> source. "diffusers" is there for every family."""

SINGLE_FILE: Mapping[str, str] = {
    # `model.diffusion_model.` and the MMDiT's names, as in sd3_medium.safetensors.
    "sd3": "Stability-AI/sd3-ref, mmdit.py",
}
"""Whole models in one file: family -> source. Sana's published files also hold the embedding of the
empty caption, which a Diffusers folder does not have, so none can be made of it."""

NETWORK_MODULES: Mapping[str, str] = {"sd3": "networks.lora_sd3"}
"""What sd-scripts calls the module that reads such a LoRA."""


def _sd3(config: Config) -> str:
    """As sd-scripts names them (library/sai_model_spec.py)."""
    if not config.get("qk_norm"):
        return "stable-diffusion-3-m"
    medium = config.get("dual_attention_layers")
    return f"stable-diffusion-3-5-{'medium' if medium else 'large'}"


ARCHITECTURES: Mapping[str, Callable[[Config], str]] = {
    "sd3": _sd3,
    "sana": lambda config: "sana",
}
"""Names for `modelspec.architecture`, by the configuration of the trained component."""


def refusal(format: Format, family: str) -> str:
    """Why a LoRA of `family` can't be written in `format`; "" if it can."""
    if format == "diffusers" or family in LORA[format]:
        return ""
    known = ", ".join(LORA[format])
    return f"there are no {format} keys for {family}: no such loader reads it (known: {known})"
