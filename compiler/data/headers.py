"""A picture's size from its header alone: no pixel is decoded.

JPEG and PNG, nearly all of every data set, are read by `quick_headers`; whatever is unusual in
them, and every other format, is left to Pillow. Formats are told by content, not by name. A file
that ends early is recognised where its format says how it must end (`endings`). HEIC is read where
the package pillow-heif is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from functools import cache
from types import ModuleType
from typing import IO

from attrs import frozen

from compiler.data.endings import short
from compiler.data.quick_headers import TRUNCATED, Broken, Read, Size, jpeg, oriented, png, webp

MAX_PIXELS = 178_956_970
"""Pillow's own limit (twice Image.MAX_IMAGE_PIXELS): beyond it a file is a decompression bomb."""
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
)
FOREIGN = frozenset((".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".nef"))
"""Names of pictures that are not read: such a file is a fault, not a companion."""

NEEDS_HEIF = 'HEIC is read with the package pillow-heif: pip install "tuner[heic]"'

_CLAIMS = SUFFIXES | FOREIGN
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1")
_HEAD = 16_384  # bytes of the first read; nearly every header lies within
_ORIENTATION = 0x0112  # EXIF
_WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")  # Pillow's modes
_DIB_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)


@frozen(slots=True)
class Foreign:
    """The file is no picture and does not claim to be one."""


Header = Size | Broken | Foreign


def read_header(path: str) -> Header:
    """What the file at `path` is. Raises OSError where the file itself can't be opened or read."""
    with open(path, "rb", buffering=0) as file:
        return header_of(path, file, os.fstat(file.fileno()).st_size)


def claims_picture(name: str) -> bool:
    """Whether a file of this name says that it is a picture."""
    return os.path.splitext(name)[1].lower() in _CLAIMS


def header_of(name: str, file: IO[bytes], total: int) -> Header:
    """What the `total` bytes of `file` are, which lie anywhere and are called `name`."""
    head = file.read(_HEAD)
    claims = claims_picture(name)
    if not head:
        return Broken("empty file (0 bytes)") if claims else Foreign()
    kind = _kind(head)
    if kind is None:
        return Broken(_no_format(name)) if claims else Foreign()
    if kind == "HEIF" and not _reads_heif():
        return Broken(NEEDS_HEIF)

    def read(offset: int, count: int) -> bytes:
        if offset + count <= len(head):
            return head[offset : offset + count]
        file.seek(offset)
        return file.read(count)

    quick = {"JPEG": jpeg, "PNG": png, "WEBP": webp}.get(kind)
    found = quick(read, total) if quick else None
    return _limited(found or _by_pillow(file, kind, read, total))


def _no_format(path: str) -> str:
    if os.path.splitext(path)[1].lower() in FOREIGN:
        return "not a format that is read (jpg, png, webp, bmp, gif, tiff, avif)"
    return "not an image: the content is of no format that is read"


def _limited(found: Header) -> Header:
    if not isinstance(found, Size):
        return found
    if found.width * found.height > MAX_PIXELS:
        return Broken(
            f"too large: {found.width}x{found.height} is more than {MAX_PIXELS:,} pixels"
            " (a decompression bomb?)"
        )
    if found.width < 1 or found.height < 1:
        return Broken(f"a picture of {found.width}x{found.height} pixels")
    return found


def _kind(head: bytes) -> str | None:
    """Pillow's name of the format, told by the first bytes."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head[4:8] == b"ftyp" and (b"avif" in head[8:64] or b"avis" in head[8:64]):
        return "AVIF"
    if head[4:8] == b"ftyp" and any(brand in head[8:64] for brand in _HEIF_BRANDS):
        return "HEIF"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _DIB_HEADERS:
        return "BMP"
    return None


def _by_pillow(file: IO[bytes], kind: str, read: Read, total: int) -> Header:
    """As Pillow sees the header; each of its many exceptions is a fault of the file."""
    images = pillow()
    try:
        file.seek(0)
        with images.open(file, formats=(kind,)) as image:
            if image.mode == "F" or (image.mode == "I" and kind == "TIFF"):
                return Broken("32-bit samples are not read (convert to 8 or 16 bits)")
            if image.mode == "LAB":
                return Broken("Lab colours are not read (convert to RGB)")
            if short(kind, image, read, total):
                return Broken(TRUNCATED)
            width, height = image.size
            # Pillow states a TIFF's size as it is seen, other formats' as it is stored
            turn = 1 if kind == "TIFF" else image.getexif().get(_ORIENTATION, 1)
            return oriented(width, height, turn if turn in range(1, 9) else 1)
    except images.DecompressionBombError:
        return Broken(f"too large: more than {MAX_PIXELS:,} pixels (a decompression bomb?)")
    except images.UnidentifiedImageError:
        return Broken(f"the header of this {kind} file can't be read")
    except Exception as error:  # a hostile header can raise anything
        return Broken(f"the header of this {kind} file can't be read ({error})")


def may_be_transparent(path: str) -> bool:
    """Whether the header of a picture leaves room for transparency; taken for granted where it
    can't be read."""
    try:
        with pillow().open(path) as image:
            return bool(image.mode in _WITH_ALPHA or "transparency" in image.info)
    except Exception:  # a hostile header can raise anything
        return True


@cache
def _reads_heif() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None


@cache
def pillow() -> ModuleType:
    """Pillow, loaded when first needed, without its warnings: what matters becomes a fault, and
    pictures between its warning and its error are merely large."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # on damaged metadata: said by a fault
    if _reads_heif():
        importlib.import_module("pillow_heif").register_heif_opener()
    return Image
