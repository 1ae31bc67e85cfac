"""WebP headers read directly, against Pillow."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
from PIL import Image

from compiler.data.quick_headers import Size, webp

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"lossless": True},
    {"icc_profile": b"profile" * 99},
    {"lossless": True, "icc_profile": b"odd"},
)


def encoded(mode: str, size: tuple[int, int], **options: Any) -> bytes:
    buffer = io.BytesIO()
    noise = random.Random(1).randbytes(size[0] * size[1] * len(mode))
    Image.frombytes(mode, size, noise).save(buffer, "WEBP", **options)
    return buffer.getvalue()


def read(data: bytes) -> Size | None:
    return webp(lambda offset, count: data[offset : offset + count], len(data))


def by_pillow(data: bytes) -> Size | None:
    try:
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
            return Size(*image.size)
    except (OSError, ValueError, SyntaxError):
        return None


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (37, 5), (640, 480), (1, 4097)])
@pytest.mark.parametrize("options", KINDS, ids=range(len(KINDS)))
def test_still_pictures_are_read_without_pillow(
    mode: str, size: tuple[int, int], options: dict[str, Any]
) -> None:
    assert read(encoded(mode, size, **options)) == Size(*size)


def test_what_may_turn_or_move_is_left_to_pillow() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read(encoded("RGB", (8, 4), exif=exif)) is None
    assert read(encoded("RGB", (8, 4), xmp=b"<x/>")) is None
    more = [Image.new("RGB", (8, 4), "red")]
    assert read(encoded("RGB", (8, 4), save_all=True, append_images=more)) is None


@pytest.mark.parametrize("options", KINDS, ids=range(len(KINDS)))
def test_damage_is_never_taken_for_a_picture(options: dict[str, Any]) -> None:
    """Where the quick reader gives a size, so does Pillow, and it is the same. Only the headers are
    damaged: pixels are not looked at before they are decoded, whatever the format."""
    whole, rng, agreed = encoded("RGBA", (24, 16), **options), random.Random(2), 0
    container = 30 if whole[12:16] == b"VP8X" else 20
    for number in range(600):
        data = bytearray(whole)
        for _ in range(rng.randrange(3)):
            data[rng.randrange(container)] = rng.randrange(256)
        cut = bytes(data[: rng.randrange(len(data))] if number % 3 == 0 else data)
        found = read(cut)
        if found is not None:
            assert found == by_pillow(cut), cut[:64]
            agreed += 1
    assert agreed > 50
