"""The layouts of files that other programs read: which there are for which family, and who laid
them down. Imports no torch, so that what does not exist is refused at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from compiler.adapters import ADAPTERS, AdapterKind
from compiler.families import FAMILIES

Format = Literal["diffusers", "kohya", "comfyui", "peft"]
FORMATS: tuple[Format, ...] = ("diffusers", "kohya", "comfyui", "peft")
Config = Mapping[str, Any]

LORA: Mapping[Format, Mapping[str, str]] = {
    "kohya": {
        # `lora_unet_` and the MMDiT's module name, query, key and value in one, with `.alpha`.
        # ComfyUI reads them as well.
        "sd3": "sd-scripts, networks/lora_sd3.py",
        "flux": "sd-scripts, networks/lora_flux.py",
        # `lora_unet_` and Diffusers' module name, or that of the UNet as published.
        "sd": "sd-scripts, networks/lora.py",
        "sdxl": "sd-scripts, networks/lora.py and library/sdxl_original_unet.py",
    },
    "comfyui": {
        # `transformer.` and Diffusers' module name. Alpha is asked for beside each layer, which
        # Diffusers refuses, so the strength stands in the weights: both load the same.
        "sd3": "ComfyUI, comfy/lora.py (model_lora_keys_unet) and comfy/utils.py",
        "flux": "ComfyUI, comfy/lora.py (model_lora_keys_unet) and comfy/utils.py",
        # The keys of sd-scripts, with `.alpha`.
        "sd": "ComfyUI, comfy/lora.py (model_lora_keys_unet)",
        "sdxl": "ComfyUI, comfy/lora.py (model_lora_keys_unet)",
    },
}
"""LoRA keys: format -> family -> source. "diffusers" is there for every family."""

SINGLE_FILE: Mapping[str, str] = {
    # `model.diffusion_model.` and the MMDiT's names, as in sd3_medium.safetensors.
    "sd3": "Stability-AI/sd3-ref, mmdit.py",
    # Without prefix, as in flux1-dev.safetensors.
    "flux": "black-forest-labs/flux, src/flux/model.py",
}
"""Whole models in one file: family -> source. Sana's published files also hold the embedding of the
empty caption, which a Diffusers folder does not have, so none can be made of it."""

WITH_VAE: frozenset[str] = frozenset({"sd3"})
"""Those whose published files hold the VAE as well. Others have it in a file of its own."""

NETWORK_MODULES: Mapping[str, str] = {
    "flux": "networks.lora_flux",
    "sd": "networks.lora",
    "sd3": "networks.lora_sd3",
    "sdxl": "networks.lora",
}
"""What sd-scripts calls the module that reads such a LoRA."""


def _sd3(config: Config) -> str:
    """As sd-scripts names them (library/sai_model_spec.py)."""
    if not config.get("qk_norm"):
        return "stable-diffusion-3-m"
    medium = config.get("dual_attention_layers")
    return f"stable-diffusion-3-5-{'medium' if medium else 'large'}"


def _sd(config: Config) -> str:
    """As sd-scripts names them; the second version is told by its text encoder's width."""
    if config.get("cross_attention_dim") != 1024:
        return "stable-diffusion-v1"
    return f"stable-diffusion-v2-{'768-v' if config.get('sample_size') == 96 else '512'}"


ARCHITECTURES: Mapping[str, Callable[[Config], str]] = {
    "flux": lambda config: f"flux-1-{'dev' if config.get('guidance_embeds') else 'schnell'}",
    "flux2": lambda config: "flux-2-klein",
    "sd": _sd,
    "sd3": _sd3,
    "sdxl": lambda config: "stable-diffusion-xl-v1-base",
    "sana": lambda config: "sana",
}
"""Names for `modelspec.architecture`, by the configuration of the trained component."""


OF_KIND: Mapping[AdapterKind, tuple[Format, ...]] = {
    "lora": ("diffusers", "kohya", "comfyui", "peft"),
    # ComfyUI reads `dora_scale`, but divides by the base's lengths of rows, not the sum's.
    "dora": ("diffusers", "peft"),
    # ComfyUI knows the modules of Diffusers by `lycoris_` and their names with underscores.
    "lokr": ("comfyui",),
    "loha": ("comfyui",),
    "oft": ("peft",),
    "boft": ("peft",),
}
"""What an adapter of each kind can be written as; the first is what its result is."""


def refusal(format: Format, family: str, kind: AdapterKind) -> str:
    """Why an adapter of this kind for `family` can't be written in `format`; "" if it can."""
    if format not in OF_KIND[kind]:
        can = " or ".join(f"`--format {name}`" for name in OF_KIND[kind])
        return f"there are no {format} keys for {ADAPTERS[kind].title}; there is {can}"
    if format == "peft" or kind not in ("lora", "dora"):
        return ""
    if format == "diffusers" and FAMILIES[family].lora_loader == "peft":
        return f"Diffusers loads no LoRA of {family}; there is `--format peft`"
    if format == "diffusers" or family in LORA[format]:
        return ""
    known = ", ".join(LORA[format])
    return f"there are no {format} keys for {family}: no such loader reads it (known: {known})"
