"""How a picture becomes a training sample: which bucket, which scale, which cut.

All sizes are whole pixels after EXIF orientation. For a picture of W x H and a geometry with
resolution R, multiple m, the bucket w x h is found in three moves, in exact rational arithmetic:

1. The wanted edges. The aspect ratio a is W/H for `preserve` and 1 for `square`.
       pixel        the shorter edge is R pixels, the longer one follows from a
       pixel_area   the area is R * R pixels
       area         the area is R megapixels (1 MP = 10^6 pixels)
2. Each wanted edge becomes the nearest multiple of m, nearest by ratio: between k*m and (k+1)*m
   the border lies at the geometric mean, m * sqrt(k * (k + 1)), and belongs to the larger one.
   For a wanted area this is the pair of multiples that minimises
   log(area / wanted)^2 + log(aspect / wanted)^2, because that sum is twice
   log(w / wanted)^2 + log(h / wanted)^2. For `pixel` the shorter edge is rounded first and the
   longer one follows from it and a, so that the aspect suffers only one rounding.
3. No edge is shorter than m. Where that lengthens the shorter edge, an area keeps precedence over
   the aspect: the longer edge follows from the area and m.

Then the picture is scaled by one factor s = max(w/W, h/H), so that it covers the bucket: the edge
that decides becomes exactly its bucket edge, the other one is rounded half up to a whole pixel
(that half pixel is all the distortion there is). The bucket is cut out of the scaled picture:

    center    in the middle; an odd pixel more is left to the right and below
    corner    at the lower right
    random    at an offset that follows from (seed, key) alone: the same in every epoch, because
              latents are cached

Pictures more elongated than `MAX_ASPECT` have no place; `unusable` says so.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from functools import lru_cache
from math import isqrt

from attrs import frozen

from compiler.plan import Geometry

MAX_ASPECT = 16
"""Longer edge over shorter edge; beyond it a picture is a line, not a picture."""


@frozen(kw_only=True, slots=True)
class Placement:
    """One picture's way into its bucket, in pixels after EXIF orientation.

    The picture is resized to `resize_width` x `resize_height`, of which `width` x `height` (the
    bucket) are cut out at (`crop_x`, `crop_y`) from the upper left.
    """

    resize_width: int
    resize_height: int
    crop_x: int
    crop_y: int
    width: int
    height: int


def unusable(width: int, height: int) -> str:
    """Why a picture of this size can't be a sample; "" where it can."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width}x{height} pixels are more elongated than {MAX_ASPECT}:1"
    return ""


def place(
    width: int, height: int, geometry: Geometry, *, seed: int = 0, key: str = ""
) -> Placement:
    """Where a picture of `width` x `height` goes; `seed` and `key` decide a random cut alone.

    Raises ValueError for a size that is `unusable`.
    """
    if reason := unusable(width, height):
        raise ValueError(reason)
    bucket = bucket_size(width, height, geometry)
    resized = cover(width, height, *bucket)
    spare = (resized[0] - bucket[0], resized[1] - bucket[1])
    crop_x, crop_y = _offset(spare, geometry.crop, seed, key)
    return Placement(
        resize_width=resized[0],
        resize_height=resized[1],
        crop_x=crop_x,
        crop_y=crop_y,
        width=bucket[0],
        height=bucket[1],
    )


@lru_cache(maxsize=65_536)
def bucket_size(width: int, height: int, geometry: Geometry) -> tuple[int, int]:
    """(width, height) of the bucket for a picture of this size; moves 1 to 3 above."""
    short, long = min(width, height), max(width, height)
    aspect = Fraction(1) if geometry.aspect == "square" else Fraction(long, short)
    if geometry.resolution_type == "pixel":
        edges = _by_edge(_literal(geometry.resolution), aspect, geometry.multiple)
    else:
        edges = _by_area(_area(geometry), aspect, geometry.multiple)
    return edges if width <= height else (edges[1], edges[0])


@lru_cache(maxsize=65_536)
def cover(width: int, height: int, bucket_width: int, bucket_height: int) -> tuple[int, int]:
    """(width, height) of a picture scaled by one factor so that it covers the bucket."""
    if bucket_width * height >= bucket_height * width:
        return bucket_width, _half_up(height * bucket_width, width)
    return _half_up(width * bucket_height, height), bucket_height


def _by_edge(short: Fraction, aspect: Fraction, multiple: int) -> tuple[int, int]:
    edge = _nearest(short**2, multiple)
    return edge, _nearest((edge * aspect) ** 2, multiple)


def _by_area(area: Fraction, aspect: Fraction, multiple: int) -> tuple[int, int]:
    short_squared = area / aspect
    edge = _nearest(short_squared, multiple)
    if short_squared < multiple**2:
        return edge, _nearest((area / multiple) ** 2, multiple)
    return edge, _nearest(area * aspect, multiple)


def _nearest(edge_squared: Fraction, multiple: int) -> int:
    """The multiple nearest by ratio to the root of `edge_squared`, and at least one multiple."""
    squared = edge_squared / multiple**2
    count = isqrt(int(squared))
    return multiple * max(1, count + (squared >= count * (count + 1)))


def _area(geometry: Geometry) -> Fraction:
    resolution = _literal(geometry.resolution)
    return resolution * 10**6 if geometry.resolution_type == "area" else resolution**2


def _literal(number: float) -> Fraction:
    """The decimal number a person wrote, not the binary one nearest to it."""
    return Fraction(repr(number))


def _half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _offset(spare: tuple[int, int], crop: str, seed: int, key: str) -> tuple[int, int]:
    if crop == "center":
        return spare[0] // 2, spare[1] // 2
    if crop == "corner":
        return spare
    name = f"{seed}/crop/{key}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(name, digest_size=16).digest()
    x, y = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8))
    return x * (spare[0] + 1) >> 64, y * (spare[1] + 1) >> 64
