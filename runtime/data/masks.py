"""Masks: from a picture's transparency or a file to shares of latent places.

A mask goes the way of its picture: turned upright, the same box of it cut out, mirrored where the
picture is. Each latent place gets the share of its area that the mask shows: black or transparent
is 0, white or opaque is 1, grey between. Areas are averaged (Pillow's box filter), so that no
ringing reaches what is left out. A picture without transparency shows all, and so does one whose
source allows it to have no mask.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from compiler.data.geometry import Placement
from compiler.data.headers import pillow
from runtime.data.keys import ALPHA
from runtime.data.pixels import BrokenPicture, cut_box, simple, upright

NAME = "mask"
"""In an entry of latents: (h, w), the share of each place that the mask shows."""
Mask = NDArray[np.float32]


class BrokenMask(BrokenPicture):
    """A picture can't be used because of its mask."""


def whole(placement: Placement) -> Mask:
    """(height, width): all of a picture's cut."""
    return np.ones((placement.height, placement.width), np.float32)


def mask_of(
    name: str, data: bytes, drawn: bytes, placement: Placement, size: tuple[int, int]
) -> Mask:
    """(height, width) float32 in [0, 1]: the mask that `name` stands for.

    `data` is the picture's file and `drawn` its mask's, if it has one; `size` is the picture's.
    Raises BrokenMask.
    """
    if drawn:
        return file_mask(drawn, placement, size)
    return alpha_mask(data, placement) if name == ALPHA else whole(placement)


def alpha_mask(data: bytes, placement: Placement) -> Mask:
    """(height, width) float32 in [0, 1]: the opacity of a picture's cut."""
    image = simple(_opened(data))
    if image.mode != "RGBA":
        return whole(placement)
    return _cut(image.getchannel("A"), placement)


def file_mask(data: bytes, placement: Placement, size: tuple[int, int]) -> Mask:
    """(height, width) float32 in [0, 1]: the brightness of a mask's cut, transparency as black.

    `size` is the (width, height) of the picture. Raises BrokenMask.
    """
    try:
        image = simple(_opened(data))
    except Exception as error:  # Pillow's decoders raise whatever their libraries do
        raise BrokenMask(f"its mask can't be decoded ({error})") from error
    if image.size != size:
        raise BrokenMask(
            f"its mask has {image.size[0]}x{image.size[1]} pixels, not {size[0]}x{size[1]}"
        )
    if image.mode == "RGBA":
        image = Image.composite(image, Image.new("RGBA", image.size, "black"), image.getchannel(3))
    return _cut(image.convert("L"), placement)


def pooled(mask: Mask, height: int, width: int) -> Tensor:
    """(H, W) pixels -> (height, width) latent places, each the mean of its pixels."""
    return nn.functional.adaptive_avg_pool2d(torch.from_numpy(mask)[None], (height, width))[0]


def _opened(data: bytes) -> Image.Image:
    with pillow().open(io.BytesIO(data)) as opened:
        return upright(opened)


def _cut(mask: Image.Image, placement: Placement) -> Mask:
    size = (placement.width, placement.height)
    box = cut_box(mask, placement)
    shares = mask.convert("F").resize(size, Image.Resampling.BOX, box=box)
    found: Mask = np.asarray(shares, np.float32) / np.float32(255)
    return np.ascontiguousarray(found[:, ::-1] if placement.mirrored else found)
