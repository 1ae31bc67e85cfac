"""How a picture becomes a training sample: which bucket, which scale, which cut.

All sizes are whole pixels after EXIF orientation. For a picture of W x H and a geometry with
resolution R, multiple m, the bucket w x h is found in three moves, in exact rational arithmetic:

1. The wanted edges. The aspect ratio a is W/H for `preserve`, 1 for `square`, and for `closest` and
   `random` that of one of the recipe's own list of ratios: the one that is nearest to W/H by ratio
   (of two equally near ones the first), or one that follows from (seed, key) alone.
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

Then the picture is scaled by one factor s. The factor that just covers the bucket is
c = max(w/W, h/H).

    resize = "cover"   s = c
    resize = "none"    the picture keeps its size, so that the cut shows a part of it in full
                       detail: s = 1. With a `max_size` M, a picture whose shorter edge is longer
                       than M is brought down to that edge before it is cut, but never so far that
                       it would not cover the bucket: s = max(c, min(1, M / min(W, H))). Nothing
                       is ever enlarged by it.

A picture that is smaller than its bucket (c > 1) is enlarged to cover it; whether the recipe
allows that, or skips or refuses such a picture, is judged by who asks (`enlarged`). An edge that
decides becomes exactly its bucket edge, others are rounded half up to a whole pixel (that half
pixel is all the distortion there is). The bucket is cut out of the scaled picture:

    center    in the middle; an odd pixel more is left to the right and below
    corner    at the lower right
    random    at an offset that follows from (seed, key) alone
    face      around the largest face; saliency: around what strikes the eye. Both need the pixels,
              so the placement says where the cut lies if nothing is found (in the middle), and the
              runtime moves it when it decodes the picture (`runtime.data.focus`)

What is random is the same in every epoch, because latents are cached. A mirrored picture is a
sample of its own: the same cut, mirrored.

Pictures more elongated than `MAX_ASPECT` have no place; `unusable` says so.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import Literal

from attrs import frozen

from compiler.plan import Geometry

Focus = Literal["", "face", "saliency"]

MAX_ASPECT = 16
"""Longer edge over shorter edge; beyond it a picture is a line, not a picture."""


@frozen(kw_only=True, slots=True)
class Placement:
    """One picture's way into its bucket, in pixels after EXIF orientation.

    The picture is resized to `resize_width` x `resize_height`, of which `width` x `height` (the
    bucket) are cut out at (`crop_x`, `crop_y`) from the upper left, and mirrored then if
    `mirrored`. With a `focus` the runtime looks at the pixels and moves the cut to a face or to
    what strikes the eye; where there is neither, it stays.
    """

    resize_width: int
    resize_height: int
    crop_x: int
    crop_y: int
    width: int
    height: int
    mirrored: bool = False
    focus: Focus = ""


def unusable(width: int, height: int) -> str:
    """Why a picture of this size can't be a sample; "" where it can."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width}x{height} pixels are more elongated than {MAX_ASPECT}:1"
    return ""


def place(
    width: int, height: int, geometry: Geometry, *, seed: int = 0, key: str = ""
) -> Placement:
    """Where a picture of `width` x `height` goes; `seed` and `key` decide what is random alone.

    Raises ValueError for a size that is `unusable`.
    """
    if reason := unusable(width, height):
        raise ValueError(reason)
    bucket = bucket_size(*_shape(width, height, geometry, seed, key), geometry)
    resized = cover(width, height, *bucket)
    if geometry.resize == "none" and resized[0] < width:
        resized = _own_size(width, height, resized, geometry.max_size)
    spare = (resized[0] - bucket[0], resized[1] - bucket[1])
    crop_x, crop_y = _offset(spare, geometry.crop, seed, key)
    looks: Focus = geometry.crop if geometry.crop in ("face", "saliency") and any(spare) else ""
    return Placement(
        resize_width=resized[0],
        resize_height=resized[1],
        crop_x=crop_x,
        crop_y=crop_y,
        width=bucket[0],
        height=bucket[1],
        focus=looks,
    )


def enlarged(width: int, height: int, placement: Placement) -> bool:
    """Whether a picture of this size is smaller than its bucket."""
    return placement.resize_width > width or placement.resize_height > height


@frozen(kw_only=True, slots=True)
class Shown:
    """What SDXL is told of a sample beside its prompt (arXiv 2307.01952, section 2.2), in pixels.

    `crop_x` and `crop_y` are the place of the cut's upper left in the scaled picture; of a
    mirrored sample in the mirrored picture.
    """

    original_width: int
    original_height: int
    crop_x: int
    crop_y: int
    width: int
    height: int


def shown_to_model(
    width: int, height: int, placement: Placement, found: tuple[int, int] | None = None
) -> Shown:
    """The sizes and the true offset of one sample; `found` is the offset that the runtime found
    for a placement with a focus."""
    crop_x, crop_y = found or (placement.crop_x, placement.crop_y)
    if placement.mirrored:
        crop_x = placement.resize_width - placement.width - crop_x
    return Shown(
        original_width=width,
        original_height=height,
        crop_x=crop_x,
        crop_y=crop_y,
        width=placement.width,
        height=placement.height,
    )


def ratio(text: str) -> tuple[int, int] | None:
    """("3:2") -> (3, 2); None for what is no ratio of two whole numbers within `MAX_ASPECT`."""
    parts = text.split(":")
    if len(parts) != 2 or not all(p.isascii() and p.isdecimal() and len(p) < 6 for p in parts):
        return None
    width, height = int(parts[0]), int(parts[1])
    return (width, height) if min(width, height) and not unusable(width, height) else None


def _shape(width: int, height: int, geometry: Geometry, seed: int, key: str) -> tuple[int, int]:
    """(width, height) in whose ratio the bucket is made."""
    if geometry.aspect not in ("closest", "random"):
        return width, height
    shapes = _shapes(geometry.buckets)
    if geometry.aspect == "random":
        return shapes[_uniform(f"{seed}/aspect/{key}")[0] * len(shapes) >> 64]

    def distance(shape: tuple[int, int]) -> Fraction:
        one, other = width * shape[1], height * shape[0]
        return Fraction(max(one, other), min(one, other))

    return min(shapes, key=distance)


@lru_cache(maxsize=256)
def _shapes(buckets: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    shapes = tuple(shape for text in buckets if (shape := ratio(text)))
    assert len(shapes) == len(buckets) > 0, "the pass has refused anything else"
    return shapes


@lru_cache(maxsize=65_536)
def bucket_size(width: int, height: int, geometry: Geometry) -> tuple[int, int]:
    """(width, height) of the bucket for a picture of this shape; moves 1 to 3 above."""
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


def _own_size(width: int, height: int, covering: tuple[int, int], max_size: int) -> tuple[int, int]:
    """(width, height) of a larger picture that is brought down to `max_size` at most (0: not at
    all), and never below `covering`."""
    short = min(width, height)
    if max_size == 0 or short <= max_size:
        return width, height
    scaled = (_half_up(width * max_size, short), _half_up(height * max_size, short))
    return scaled if all(a >= b for a, b in zip(scaled, covering, strict=True)) else covering


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


def edge_of(shape: Geometry) -> float:
    """A resolution as an edge in pixels: the root of an area."""
    area = shape.resolution_type == "area"
    return (shape.resolution * 1e6) ** 0.5 if area else shape.resolution


def _area(geometry: Geometry) -> Fraction:
    resolution = _literal(geometry.resolution)
    return resolution * 10**6 if geometry.resolution_type == "area" else resolution**2


def _literal(number: float) -> Fraction:
    """The decimal number a person wrote, not the binary one nearest to it."""
    return Fraction(repr(number))


def _half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _offset(spare: tuple[int, int], crop: str, seed: int, key: str) -> tuple[int, int]:
    if crop == "corner":
        return spare
    if crop != "random":
        return spare[0] // 2, spare[1] // 2
    x, y = _uniform(f"{seed}/crop/{key}")
    return x * (spare[0] + 1) >> 64, y * (spare[1] + 1) >> 64


def _uniform(name: str) -> tuple[int, int]:
    """Two uniform numbers of 64 bits that follow from `name`."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
