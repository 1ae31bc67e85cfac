"""Which family's adapter a file holds, by the names and shapes in its header alone."""

from __future__ import annotations

import re

from compiler.draft import ModelFacts
from compiler.families import FAMILIES
from compiler.safetensors import Header

OF_A_UNET = re.compile(
    r"unet\.|(lora_unet|lycoris)"
    r"_(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)_"
)
OF_A_TRANSFORMER = re.compile(
    r"(transformer\.|lora_transformer_|lora_unet_|lycoris_|diffusion_model\.)?"
    r"(single_|joint_|double_)?(transformer_)?(blocks|layers)[._]"
)
"""How layers' names begin, in Diffusers' keys and in those of sd-scripts."""
PROMPT = re.compile(r".*[._]attn2[._]to_k\.(lora_A|lora_down)\.weight")
"""In a UNet: a layer whose inputs are the prompt's states, as many as `cross_attention_dim`."""


def other_family(header: Header, model: ModelFacts) -> str:
    """Why an adapter is of another family than the base; "" if it need not be."""
    family, component = model.family, model.family.trained_component
    if component == "unet" and any(OF_A_TRANSFORMER.match(name) for name in header.shapes):
        return f"its layers are of a transformer, and {family.title} has a UNet"
    if component == "transformer" and any(OF_A_UNET.match(name) for name in header.shapes):
        return f"its layers are of a UNet, and {family.title} has a transformer"
    own = model.configs[component].get("cross_attention_dim")
    if component != "unet" or not isinstance(own, int):
        return ""
    widths = {shape[1] for n, shape in header.shapes.items() if PROMPT.match(n) and len(shape) > 1}
    if not widths or own in widths:
        return ""
    (width, *_) = sorted(widths)
    others = [
        card.title
        for card in FAMILIES.values()
        if any(k.configs.get("unet", {}).get("cross_attention_dim") == width for k in card.known)
    ]
    whose = f", as {' or '.join(others)} has them" if others else ""
    return f"it is for prompts' states of {width} numbers{whose}, and this base's have {own}"
