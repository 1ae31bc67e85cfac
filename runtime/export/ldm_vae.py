"""From Diffusers' names of an AutoencoderKL to those of latent diffusion's own code, which whole
model files hold it under.

Source: CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py. There a decoder's blocks
are counted from its output, and attention is made of 1x1 convolutions.
"""

from __future__ import annotations

import re
from functools import partial

from torch import Tensor

from runtime.export.lazy import Lazy, Tensors

RULES: tuple[tuple[str, str], ...] = (
    (r"(en|de)coder\.conv_norm_out", r"\1coder.norm_out"),
    (r"(en|de)coder\.mid_block\.resnets\.0", r"\1coder.mid.block_1"),
    (r"(en|de)coder\.mid_block\.resnets\.1", r"\1coder.mid.block_2"),
    (r"(en|de)coder\.mid_block\.attentions\.0\.group_norm", r"\1coder.mid.attn_1.norm"),
    (r"(en|de)coder\.mid_block\.attentions\.0\.to_([qkv])", r"\1coder.mid.attn_1.\2"),
    (r"(en|de)coder\.mid_block\.attentions\.0\.to_out\.0", r"\1coder.mid.attn_1.proj_out"),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", r"decoder.up.\1.block.\2"),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0", r"decoder.up.\1.upsample"),
    (r"(.*)\.conv_shortcut", r"\1.nin_shortcut"),
)
"""Each is of the beginning of a name, up to a dot; several may follow each other."""


def laid_out(tensors: Tensors) -> Tensors:
    """All tensors of a VAE under the published names, without the prefix of whole files."""
    ups = [
        int(found[1]) for name in tensors if (found := re.match(r"decoder\.up_blocks\.(\d+)", name))
    ]
    last = max(ups, default=0)
    return {_named(name, last): _shaped(name, lazy) for name, lazy in tensors.items()}


def _named(name: str, last: int) -> str:
    for pattern, new in RULES:
        name = re.sub(rf"^{pattern}(?=\.)", new, name)
    return re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{last - int(m[1])}", name)


def _shaped(name: str, lazy: Lazy) -> Lazy:
    if not re.search(r"attentions\.0\.to_.*weight$", name) or len(lazy.shape) != 2:
        return lazy
    shape = (*lazy.shape, 1, 1)
    return Lazy(shape=shape, dtype=lazy.dtype, read=partial(_viewed, lazy, shape))


def _viewed(lazy: Lazy, shape: tuple[int, ...]) -> Tensor:
    return lazy.read().view(shape)
