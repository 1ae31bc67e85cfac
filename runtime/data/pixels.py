"""Files to pixels: decoded, turned upright, scaled and cut once, in sRGB on white.

The picture is resampled with Lanczos (Pillow's, window 3, widened when shrinking, so that nothing
aliases) straight from the full picture into the cut, in one pass: equal, but for rounding, to
scaling all of it and cutting then, without the pixels that are thrown away. No `reducing_gap` and
no reduced JPEG decoding: both are quicker, and both change pixels. Colours and transparency follow,
on the small picture: an embedded ICC profile is converted to sRGB (perceptual; a profile that can't
be read or is of another colour space is ignored, as browsers do), CMYK without profile by Pillow's
formula, 16-bit values are rounded to 8, palettes and greyscale become RGB, and transparency is laid
on white. Of an animation the first picture counts.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from compiler.data.geometry import Placement
from compiler.data.headers import pillow
from runtime.data.focus import focused

Pixels = NDArray[np.uint8]

_ALPHA = ("LA", "RGBA", "PA", "La", "RGBa")
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # mode -> colour space of a fitting profile


class BrokenPicture(Exception):
    """The pixels of a file can't be decoded; the message says why."""


def decode(data: bytes, placement: Placement, size: tuple[int, int]) -> Pixels:
    """The file's bytes as (height, width, 3) uint8 sRGB of the placement's bucket.

    `size` is the (width, height) that the placement was made for. Raises BrokenPicture if the
    file can't be decoded or has another size.
    """
    return decode_placed(data, placement, size)[0]


def decode_placed(
    data: bytes, placement: Placement, size: tuple[int, int]
) -> tuple[Pixels, Placement]:
    """As `decode`, with the placement's cut where its focus was found."""
    try:
        with pillow().open(io.BytesIO(data)) as opened:
            image = upright(opened)
    except Exception as error:  # Pillow's decoders raise whatever their libraries do
        raise BrokenPicture(f"broken image data ({error})") from error
    if image.size != size:
        raise BrokenPicture(f"{image.size[0]}x{image.size[1]} pixels, not {size[0]}x{size[1]}")
    try:
        plain = simple(image)
        placement = focused(plain, placement)
        pixels = np.asarray(_srgb(_placed(plain, placement), image.info))
        return (pixels[:, ::-1] if placement.mirrored else pixels), placement
    except (OSError, ValueError) as error:
        raise BrokenPicture(f"pixels can't be converted ({error})") from error


def to_tensor(pixels: Pixels) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def upright(opened: Image.Image) -> Image.Image:
    """The first picture of a file, decoded and turned as its EXIF orientation says."""
    opened.seek(0)
    opened.load()
    return ImageOps.exif_transpose(opened)


def simple(image: Image.Image) -> Image.Image:
    """The same picture in a mode to resample: L, RGB, CMYK, or RGBA where it has alpha."""
    mode = image.mode
    if mode.startswith("I"):
        return _eight_bits(image)
    if mode in _ALPHA or "transparency" in image.info:
        return image.convert("RGBA")
    if mode in _SPACES:
        return image
    return image.convert("L" if mode == "1" else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale (0 to 65535) as 8 bits: 65535 is 255, rounded to the nearest."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65_535:
        raise ValueError("32-bit samples are not read")
    return Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8))


def _placed(image: Image.Image, placement: Placement) -> Image.Image:
    """Scale and cut in one."""
    size = (placement.width, placement.height)
    return image.resize(size, Image.Resampling.LANCZOS, box=cut_box(image, placement))


def cut_box(image: Image.Image, placement: Placement) -> tuple[float, float, float, float]:
    """The box (left, upper, right, lower) of the full picture that the cut shows."""
    across, down = image.width / placement.resize_width, image.height / placement.resize_height
    return (
        placement.crop_x * across,
        placement.crop_y * down,
        min(image.width, (placement.crop_x + placement.width) * across),
        min(image.height, (placement.crop_y + placement.height) * down),
    )


def _srgb(image: Image.Image, info: dict[Any, Any]) -> Image.Image:
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colours = image.convert("RGB") if alpha else image
    profile = info.get("icc_profile")
    convert = _conversion(profile, colours.mode) if isinstance(profile, bytes) else None
    seen = ImageCms.applyTransform(colours, convert) if convert else colours.convert("RGB")
    assert seen is not None, "a transform that is not in place returns a picture"
    if alpha is None:
        return seen
    white = Image.new("RGB", seen.size, "white")
    white.paste(seen, mask=alpha)
    return white


@lru_cache(maxsize=64)
def _conversion(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From `profile` to sRGB for pictures of `mode`; None where the profile can't be used."""
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
