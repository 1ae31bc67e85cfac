"""The layouts of files that other programs read: which there are for which family, and who laid
them down. Imports no torch, so that what does not exist is refused at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from compiler.adapters import ADAPTERS, LORAS, LYCORIS_FILE, AdapterKind
from compiler.families import FAMILIES

Format = Literal["diffusers", "kohya", "comfyui", "peft", "lycoris"]
FORMATS: tuple[Format, ...] = ("diffusers", "kohya", "comfyui", "peft", "lycoris")
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
        "sdxl_refiner": "sd-scripts, networks/lora.py and library/sdxl_original_unet.py",
        "kolors": "sd-scripts, networks/lora.py, as of any UNet of Diffusers",
        # Published names again.
        "flux2": "musubi-tuner, networks/lora_flux_2.py",
        "flux2_dev": "musubi-tuner, networks/lora_flux_2.py",
        "lumina2": "sd-scripts, networks/lora_lumina.py",
        # Diffusers' names.
        "qwen_image": "musubi-tuner, networks/lora_qwen_image.py",
        "z_image": "musubi-tuner, networks/lora_zimage.py",
    },
    "comfyui": {
        # `transformer.` and Diffusers' module name. Alpha is asked for beside each layer, which
        # Diffusers refuses, so the strength stands in the weights: both load the same.
        "sd3": "ComfyUI, comfy/lora.py (model_lora_keys_unet) and comfy/utils.py",
        "flux": "ComfyUI, comfy/lora.py (model_lora_keys_unet) and comfy/utils.py",
        "pixart": "ComfyUI, comfy/lora.py (model_lora_keys_unet), pixart_to_diffusers",
        # The keys of sd-scripts, with `.alpha`.
        "sd": "ComfyUI, comfy/lora.py (model_lora_keys_unet)",
        "sdxl": "ComfyUI, comfy/lora.py (model_lora_keys_unet)",
        "sdxl_refiner": "ComfyUI, comfy/lora.py (model_lora_keys_unet)",
        "kolors": "ComfyUI, comfy/lora.py (model_lora_keys_unet)",
        # Diffusers' names, as of the first two.
        "qwen_image": "ComfyUI, comfy/lora.py (model_lora_keys_unet)",
        "z_image": "ComfyUI, comfy/lora.py (model_lora_keys_unet), z_image_to_diffusers",
        # `diffusion_model.` and published names.
        "flux2": "ComfyUI, comfy/lora.py (model_lora_keys_unet)",
        "flux2_dev": "ComfyUI, comfy/lora.py (model_lora_keys_unet)",
        "lumina2": "ComfyUI, comfy/lora.py (model_lora_keys_unet)",
    },
}
"""LoRA keys: format -> family -> source. "diffusers" is there for every family."""

SINGLE_FILE: Mapping[str, str] = {
    # `model.diffusion_model.` and the MMDiT's names, as in sd3_medium.safetensors.
    "sd3": "Stability-AI/sd3-ref, mmdit.py",
    # Without prefix, as in flux1-dev.safetensors.
    "flux": "black-forest-labs/flux, src/flux/model.py",
    # `model.diffusion_model.`, `first_stage_model.` and `cond_stage_model.`.
    "sd": "CompVis/latent-diffusion, ldm/modules",
    # The same with `conditioner.embedders.`, as in sd_xl_base_1.0.safetensors.
    "sdxl": "Stability-AI/generative-models, sgm/modules",
    "sdxl_refiner": "Stability-AI/generative-models, sgm/modules",
    # The transformer alone, without prefix, as in flux-2-klein-base-4b.safetensors.
    "flux2": "black-forest-labs/flux2, src/flux2/model.py",
    "flux2_dev": "black-forest-labs/flux2, src/flux2/model.py",
    # As in ComfyUI's split files.
    "lumina2": "Alpha-VLLM/Lumina-Image-2.0, models/model.py",
    "qwen_image": "ComfyUI, comfy/ldm/qwen_image/model.py, whose names are Diffusers'",
    "z_image": "ComfyUI, comfy/ldm/lumina/model.py",
}
"""Whole models in one file: family -> source. Sana's published files also hold the embedding of the
empty caption, which a Diffusers folder does not have, so none can be made of it."""

NO_KEYS: Mapping[str, Mapping[str, str]] = {
    "kohya": {
        "pixart": "sd-scripts don't train PixArt",
        "sana": "sd-scripts don't train Sana",
    },
    "comfyui": {
        "sana": "ComfyUI has no Sana of its own",
    },
}
"""Where there is no layout: why."""

NETWORK_MODULES: Mapping[str, str] = {
    "flux": "networks.lora_flux",
    "flux2": "networks.lora_flux_2",
    "flux2_dev": "networks.lora_flux_2",
    "kolors": "networks.lora",
    "lumina2": "networks.lora_lumina",
    "qwen_image": "networks.lora_qwen_image",
    "sd": "networks.lora",
    "sd3": "networks.lora_sd3",
    "sdxl": "networks.lora",
    "sdxl_refiner": "networks.lora",
    "z_image": "networks.lora_zimage",
}
"""What sd-scripts or musubi-tuner call the module that reads such a LoRA."""


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
    "flux2_dev": lambda config: "flux-2-dev",
    "kolors": lambda config: "kolors",
    "lumina2": lambda config: "lumina-2",
    "pixart": lambda config: "pixart-sigma",
    "qwen_image": lambda config: "qwen-image",
    "sd": _sd,
    "sd3": _sd3,
    "sdxl": lambda config: "stable-diffusion-xl-v1-base",
    "sdxl_refiner": lambda config: "stable-diffusion-xl-v1-refiner",
    "sana": lambda config: "sana",
    "z_image": lambda config: "z-image",
}
"""Names for `modelspec.architecture`, by the configuration of the trained component."""


OF_KIND: Mapping[AdapterKind, tuple[Format, ...]] = {
    "lora": ("diffusers", "kohya", "comfyui", "peft"),
    "dora": ("diffusers", "kohya", "comfyui", "peft"),
    "dylora": ("diffusers", "kohya", "comfyui", "peft"),
    # ComfyUI knows the modules of Diffusers by `lycoris_` and their names with underscores, as
    # LyCORIS itself does; in sd-scripts it has `lora_unet_` and their own names (lycoris/kohya.py).
    "lokr": ("comfyui", "kohya", "lycoris"),
    "loha": ("comfyui", "kohya", "lycoris"),
    "glora": ("comfyui", "kohya", "lycoris"),
    "full": ("comfyui", "kohya", "lycoris"),
    "ia3": ("peft",),
    "oft": ("peft",),
    "boft": ("peft",),
    "textual-inversion": ("diffusers",),
}
"""What an adapter of each kind can be written as; see `usual` for which, if none is asked for."""
_TURNED = (
    "peft's turns a layer's inputs, as it was trained, and that of LyCORIS, whose keys ComfyUI and "
    "sd-scripts read, its outputs"
)
OTHERWISE: Mapping[AdapterKind, str] = {
    "oft": _TURNED,
    "boft": _TURNED,
    "ia3": "ComfyUI reads none, and LyCORIS' leaves a layer's bias as it is",
}
"""Why kinds that other programs know by the same name are not what they read. peft, tuners/oft and
tuners/boft; LyCORIS, modules/diag_oft.py, modules/boft.py and modules/ia3.py; ComfyUI,
comfy/weight_adapter."""


FUSED: Mapping[Format, frozenset[str]] = {
    "kohya": frozenset({"flux", "flux2", "flux2_dev", "lumina2", "sd3"}),
    "comfyui": frozenset({"flux2", "flux2_dev", "lumina2"}),
}
"""Where several layers are one under a format's names, for which DoRA's lengths of rows and the
updates of LyCORIS' kinds have no form; whole matrices lie one upon the other."""

NO_LYCORIS: Mapping[str, str] = {
    "lumina2": "ComfyUI knows its layers by their published names, where query, key and value are "
    "one layer",
    "pixart": "ComfyUI has none that begin with `lycoris_` there",
    "sana": NO_KEYS["comfyui"]["sana"],
}
"""Families whose layers ComfyUI does not know by LyCORIS' names (comfy/lora.py,
model_lora_keys_unet): why."""
_OUTSIDE = re.compile(r"time_guidance_embed\..*|.*_modulation(_img|_txt)?\..*")
_NO_LAYERS: Mapping[str, re.Pattern[str]] = {"flux2": _OUTSIDE, "flux2_dev": _OUTSIDE}
"""Layers that are missing there in other families (comfy/utils.py, flux_to_diffusers)."""


def unread(family: str, modules: Iterable[str]) -> list[str]:
    """Those of `modules` whose adapters of LyCORIS' kinds ComfyUI would pass over."""
    pattern = _NO_LAYERS.get(family)
    return [m for m in modules if pattern is not None and pattern.fullmatch(m)]


def usual(family: str, kind: AdapterKind) -> Format:
    """What an adapter of this kind is written as where nothing else is asked for."""
    first = OF_KIND[kind][0]
    if not refusal(first, family, kind):
        return first
    return "peft" if kind in LORAS else "lycoris"


def refusal(format: Format, family: str, kind: AdapterKind) -> str:
    """Why an adapter of this kind for `family` can't be written in `format`; "" if it can."""
    if format not in OF_KIND[kind]:
        can = " or ".join(f"`--format {name}`" for name in OF_KIND[kind])
        why = f": {OTHERWISE[kind]}" if kind in OTHERWISE else ""
        return f"there are no {format} keys for {ADAPTERS[kind].title}{why}; there is {can}"
    title = ADAPTERS[kind].title
    if ADAPTERS[kind].file == LYCORIS_FILE and format == "comfyui" and family in NO_LYCORIS:
        return f"there are no comfyui keys for {title} of {family}: {NO_LYCORIS[family]}"
    if ADAPTERS[kind].file == LYCORIS_FILE and format == "kohya":
        if family in LORA[format] and (kind == "full" or family not in FUSED[format]):
            return ""
        why = NO_KEYS[format].get(family, "query, key and value are one layer there")
        return f"there are no kohya keys for {title} of {family}: {why}"
    if format == "peft" or kind not in LORAS:
        return ""
    if format == "diffusers" and FAMILIES[family].lora_loader == "peft":
        return f"Diffusers loads no LoRA of {family}; there is `--format peft`"
    if format == "diffusers":
        return ""
    if kind == "dora" and family in FUSED[format]:
        return (
            f"there are no {format} keys for DoRA of {family}: query, key and value are one layer "
            "there"
        )
    if family in LORA[format]:
        return ""
    why, known = NO_KEYS[format][family], ", ".join(LORA[format])
    return f"there are no {format} keys for {family}: {why} (known: {known})"
