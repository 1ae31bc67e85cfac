"""Whether a file of the rarer formats ends before its (first) picture does.

Only structure is looked at: lengths that the format states against the length of the file.
"""

from __future__ import annotations

from typing import Any

from compiler.data.quick_headers import Read

_OFFSETS = ((273, 279), (324, 325))  # TIFF: strips and tiles, (offsets, byte counts)


def short(kind: str, image: Any, read: Read, total: int) -> bool:
    """Whether the file of `total` bytes that Pillow opened as `image` is cut off."""
    check = _CHECKS.get(kind)
    return check is not None and check(image, read, total)


def _webp(image: Any, read: Read, total: int) -> bool:
    """A RIFF file states its length behind the first four bytes."""
    return int.from_bytes(read(4, 4), "little") + 8 > total


def _boxes(image: Any, read: Read, total: int) -> bool:
    """An ISO media file is a row of boxes (length, name); length 1 means 64 bits, 0 to the end."""
    offset = 0
    while offset < total:
        box = read(offset, 16)
        if len(box) < 8:
            return True
        length = int.from_bytes(box[:4], "big")
        if length == 0:
            return False
        if length == 1:
            length = int.from_bytes(box[8:16], "big")
        if length < 8:
            return True
        offset += length
    return offset > total


def _bmp(image: Any, read: Read, total: int) -> bool:
    """Uncompressed rows, each padded to four bytes, from the offset that the header states."""
    start = int.from_bytes(read(10, 4), "little")
    compression = int.from_bytes(read(30, 4), "little")
    if compression not in (0, 3) or int.from_bytes(read(14, 4), "little") < 40:
        return start >= total
    bits = int.from_bytes(read(28, 2), "little")
    width, height = map(int, image.size)
    return start + (width * bits + 31) // 32 * 4 * height > total


def _gif(image: Any, read: Read, total: int) -> bool:
    """Blocks up to the end of the first frame's data."""
    offset = 13 + _colours(read(10, 1))
    while True:
        kind = read(offset, 1)
        if kind == b"!":
            offset = _after_blocks(read, offset + 2)
        elif kind == b",":
            offset += 10 + _colours(read(offset + 9, 1)) + 1
            return _after_blocks(read, offset) > total
        else:
            return True
        if offset >= total:
            return True


def _colours(flags: bytes) -> int:
    """Bytes of the colour table that these flags announce."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _after_blocks(read: Read, offset: int) -> int:
    """The offset behind a row of sub-blocks; beyond the file if it ends before they do."""
    while length := read(offset, 1):
        offset += 1 + length[0]
        if length == b"\0":
            return offset
    return offset + 1


def _tiff(image: Any, read: Read, total: int) -> bool:
    """Every strip or tile lies inside the file."""
    for offsets, counts in _OFFSETS:
        places, lengths = image.tag_v2.get(offsets), image.tag_v2.get(counts)
        if places and lengths:
            ends = [int(p) + int(n) for p, n in zip(places, lengths, strict=False)]
            return max(ends) > total
    return False


_CHECKS = {
    "WEBP": _webp,
    "AVIF": _boxes,
    "HEIF": _boxes,
    "BMP": _bmp,
    "GIF": _gif,
    "TIFF": _tiff,
}
