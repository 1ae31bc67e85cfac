"""Pixels: every kind of file, upright, in place, in sRGB on white."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from compiler.data.geometry import Placement, place, shown_to_model
from compiler.data.scan import scan
from compiler.plan import Geometry
from runtime.data.pixels import BrokenPicture, decode, to_tensor
from tests.compiler.data.manifests import whole
from tests.compiler.data.pictures import chunk, encoded, oriented, picture


def as_is(data: bytes, width: int, height: int) -> np.ndarray:
    return decode(data, whole(width, height), (width, height))


def reference(image: Image.Image, placement: Placement) -> np.ndarray:
    """Scale all of the picture, then cut."""
    size = (placement.resize_width, placement.resize_height)
    scaled = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    y, x = placement.crop_y, placement.crop_x
    return scaled[y : y + placement.height, x : x + placement.width]


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_are_exact(format: str) -> None:
    image = picture(40, 30)
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(as_is(encoded(image, format, **options), 40, 30), np.asarray(image))


@pytest.mark.parametrize(("format", "bound"), [("JPEG", 5.0), ("AVIF", 4.0), ("GIF", 12.0)])
def test_lossy_formats_are_near(format: str, bound: float) -> None:
    image = picture(64, 48)
    options = {} if format == "GIF" else {"quality": 95}
    difference = as_is(encoded(image, format, **options), 64, 48).astype(float) - np.asarray(image)
    assert np.abs(difference).mean() < bound


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(40, 400), st.integers(40, 400)),
    st.sampled_from(["center", "corner", "random"]),
    st.sampled_from(["square", "preserve"]),
    st.integers(1, 8),
)
def test_scaling_into_the_cut_equals_scaling_then_cutting(
    size: tuple[int, int], crop: str, aspect: str, orientation: int
) -> None:
    geometry = Geometry(
        resolution=96.0, resolution_type="pixel_area", aspect=aspect, crop=crop, multiple=32
    )
    data = oriented(picture(*size, seed=3), orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    placement = place(*upright.size, geometry, key="k")
    found = decode(data, placement, upright.size)
    assert found.shape == (placement.height, placement.width, 3) and found.dtype == np.uint8
    difference = np.abs(found.astype(int) - reference(upright, placement).astype(int))
    assert difference.max() <= 2 and difference.mean() < 0.5  # each pass rounds to 8 bits


@pytest.mark.parametrize("style", ["center", "corner", "random"])
def test_a_cut_at_its_own_size_is_the_pixels_themselves(style: str) -> None:
    geometry = Geometry(
        resolution=64.0,
        resolution_type="pixel",
        aspect="square",
        crop=style,
        multiple=32,
        resize="none",
    )
    image = picture(201, 133)
    placement = place(201, 133, geometry, key="k")
    pixels = np.asarray(image)
    y, x = placement.crop_y, placement.crop_x
    found = decode(encoded(image, "PNG"), placement, image.size)
    assert np.array_equal(found, pixels[y : y + 64, x : x + 64])
    mirrored = decode(encoded(image, "PNG"), evolve(placement, mirrored=True), image.size)
    told = shown_to_model(201, 133, evolve(placement, mirrored=True))
    across = pixels[:, ::-1]  # the offset that is told is one in the mirrored picture
    expected = across[told.crop_y : told.crop_y + 64, told.crop_x : told.crop_x + 64]
    assert np.array_equal(mirrored, expected)


def test_orientation_is_undone() -> None:
    image = Image.new("RGB", (32, 16), "black")
    image.paste((255, 0, 0), (0, 0, 8, 8))  # a red mark in the upper left
    found = as_is(oriented(image, 6), 16, 32)  # 6: to be turned clockwise
    assert found[:8, 8:].mean(axis=(0, 1))[0] > 200 > 60 > found[16:].mean()


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    for data in (encoded(image, "PNG"), encoded(image, "WEBP", lossless=True)):
        found = as_is(data, 4, 4)
        assert found[0, 0].tolist() == [0, 0, 255] and found[3, 3].tolist() == [255, 255, 255]
        assert found[0, 1].tolist() == [127, 127, 127]


def test_hidden_colours_do_not_bleed() -> None:
    """Red that is wholly transparent leaves no trace when scaled."""
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 32, 64))
    placement = Placement(
        resize_width=16, resize_height=16, crop_x=0, crop_y=0, width=16, height=16
    )
    found = decode(encoded(image, "PNG"), placement, (64, 64)).astype(int)
    assert np.abs(found[..., 0] - found[..., 1]).max() <= 1


def test_palettes_grey_and_bits() -> None:
    image = picture(20, 10)
    palette = image.quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(as_is(encoded(palette, "PNG"), 20, 10), expected)
    palette.putpixel((0, 0), 5)
    clear = as_is(encoded(palette, "PNG", transparency=5), 20, 10)
    assert clear[0, 0].tolist() == [255, 255, 255]
    grey = image.convert("L")
    assert np.array_equal(as_is(encoded(grey, "PNG"), 20, 10), np.stack([np.asarray(grey)] * 3, -1))
    bits = grey.convert("1")
    assert set(as_is(encoded(bits, "PNG"), 20, 10).ravel().tolist()) == {0, 255}
    both = Image.merge("LA", (grey, Image.new("L", grey.size, 0)))
    assert as_is(encoded(both, "PNG"), 20, 10).min() == 255


def test_sixteen_bits_are_rounded() -> None:
    values = np.array([[0, 128, 129, 257, 32_896, 65_535]], np.uint16)
    found = as_is(encoded(Image.fromarray(values), "PNG"), 6, 1)
    expected = np.floor(values.astype(float) * 255 / 65_535 + 0.5)
    assert found[0, :, 0].tolist() == expected[0].astype(int).tolist() == [0, 0, 1, 1, 128, 255]


def test_sixteen_bit_colours() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", 65_535, 0, 32_768) * 2 for _ in range(2))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    data = b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")
    assert as_is(data, 2, 2)[1, 1].tolist() == [255, 0, 128]


def test_cmyk_without_profile() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(as_is(data, 16, 16)[8, 8].astype(int) - [255, 0, 0]).max() <= 3


def test_first_picture_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.abs(as_is(data, 8, 8)[4, 4].astype(int) - [0, 0, 255]).max() <= 3


def linear_profile() -> bytes:
    """A matrix profile with sRGB's primaries and a linear transfer curve, made from sRGB's own."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", data, 128)[0]
    curve = struct.pack(">4sII", b"curv", 0, 0)  # no entries: the identity
    start = len(data)
    data += curve + bytes(-len(curve) % 4)
    for entry in range(132, 132 + 12 * count, 12):
        if data[entry : entry + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            struct.pack_into(">II", data, entry + 4, start, len(curve))
    struct.pack_into(">I", data, 0, len(data))
    return bytes(data)


def test_colour_profiles_become_srgb() -> None:
    grey = Image.new("RGB", (8, 8), (55, 55, 55))
    data = encoded(grey, "PNG", icc_profile=linear_profile())
    linear = 55 / 255
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    assert np.abs(as_is(data, 8, 8).astype(float) - expected).max() <= 1.0


def test_useless_profiles_are_ignored() -> None:
    image = picture(20, 10)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode, profile in (("RGB", b"no profile"), ("L", srgb)):
        data = encoded(image.convert(mode), "PNG", icc_profile=profile)
        expected = np.asarray(image.convert(mode).convert("RGB"))
        assert np.array_equal(as_is(data, 20, 10), expected)
    same = as_is(encoded(image, "PNG", icc_profile=srgb), 20, 10).astype(int)
    assert np.abs(same - np.asarray(image)).max() <= 1


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_broken_bodies_are_named(format: str, cut: float) -> None:
    data = encoded(picture(64, 48), format)
    with pytest.raises(BrokenPicture, match=r"broken image data|pixels"):
        as_is(data[: int(len(data) * cut)], 64, 48)


def test_changed_size_is_named() -> None:
    with pytest.raises(BrokenPicture, match="10x10 pixels, not 20x10"):
        as_is(encoded(picture(10, 10), "PNG"), 20, 10)


def test_tensor_range() -> None:
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    assert torch.equal(to_tensor(pixels), torch.tensor([-1.0, 1.0, 51 / 127.5 - 1]).view(3, 1, 1))


def test_real_photographs(data_root: Path) -> None:
    geometry = Geometry(
        resolution=256.0,
        resolution_type="pixel_area",
        aspect="preserve",
        crop="center",
        multiple=64,
    )
    folder = data_root / "dreambooth" / "dog6"
    for found in scan(folder).pictures:
        data = (folder / found.key).read_bytes()
        placement = place(found.width, found.height, geometry)
        pixels = decode(data, placement, (found.width, found.height))
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        difference = np.abs(pixels.astype(int) - reference(upright, placement).astype(int))
        assert difference.max() <= (2 if "icc_profile" not in upright.info else 40)
        assert difference.mean() < 8
