"""Prompt following for pictures of one plain coloured shape: does the picture show what was asked?

The measure, `score(image, prompt)`, in full:

1. The prompt's words are looked up in `COLOURS` and `SHAPES`. A prompt that names none of them, or
   more than one colour or more than one shape, has no score (`None`).
2. The picture is resized to 64x64. Background: the median colour of the border. A pixel's coverage
   is its distance from the background over the figure's, clipped to 0..1, where the figure's is the
   median over the pixels at more than half the largest distance. Coverage under 0.15 counts as 0.
   There is no figure if that distance is under 60 (of 441, RGB), or if coverage fills less than
   1 % or more than 60 % of the picture.
3. Colour: the nearest hue of the vocabulary, pixel by pixel over the solid figure (coverage over
   0.8). The picture has a colour if one hue wins at least 80 % of these pixels and their median
   saturation is at least 0.35.
4. Shape: the figure is compared with a drawing of every shape of the vocabulary, upright and turned
   by up to 15 degrees, the centre of mass and the root-mean-square radius made the same. The
   picture has the shape whose drawing overlaps best (sum of minima over sum of maxima of the two
   coverages), if that overlap, less the share of the figure farther out than 2.4 radii, is at
   least 0.75.
5. 1.0 if every named thing is what the picture has, else 0.0.

Nothing is learnt and nothing is random. A blob, a blank and noise have no shape, so they score 0.
"""

import re
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 38, 38),
    "yellow": (236, 200, 30),
    "green": (44, 160, 62),
    "cyan": (40, 190, 205),
    "blue": (38, 80, 215),
    "purple": (145, 50, 190),
}
BASE_SHAPES = ("circle", "square", "triangle", "star", "cross")
SUBJECT = "zorp"
SHAPES = (*BASE_SHAPES, SUBJECT)
BACKGROUND = (246, 246, 246)
SIZE = 64  # pixels a side, of the drawings and of the measure

MIN_CONTRAST = 60.0
MIN_COVERAGE = 0.15
AREA = (0.01, 0.60)
SOLID = 0.8
MIN_SATURATION = 0.35
MIN_COLOUR_SHARE = 0.8
MIN_OVERLAP = 0.75
STEP, GRID = 0.1, 49  # the frame of a shape: grid points, their distance in radii
ANGLES = (-15.0, -10.0, -5.0, 0.0, 5.0, 10.0, 15.0)


# The vocabulary's geometry: coordinates in units of the shape's radius, y upwards.


def inside(shape: str, x: Floats, y: Floats) -> Mask:
    """True where the point is inside the named shape of radius 1 at the origin."""
    match shape:
        case "circle":
            return x**2 + y**2 <= 1.0
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.88
        case "triangle":
            return (y >= -0.62) & (abs(x) * 1.8 <= 1.15 - y)
        case "star":
            return _in_star(x, y)
        case "cross":
            return (np.maximum(abs(x), abs(y)) <= 1.05) & (np.minimum(abs(x), abs(y)) <= 0.33)
        case "zorp":
            return _in_zorp(x, y)
    raise ValueError(f"`{shape}` is not one of {', '.join(SHAPES)}")


def _in_star(x: Floats, y: Floats) -> Mask:
    """Five points: radius 1.2 at the tips and 0.52 between them, joined by straight lines."""
    tip, notch, sector = 1.2, 0.52, np.pi / 5
    angle = np.arctan2(x, y)  # 0 is up
    folded = abs((angle + sector) % (2 * sector) - sector)  # 0 at a tip, `sector` at a notch
    radius = np.hypot(x, y)
    along, across = radius * np.cos(folded), radius * np.sin(folded)
    notch_along, notch_across = notch * np.cos(sector), notch * np.sin(sector)
    within: Mask = along * notch_across + across * (tip - notch_along) <= tip * notch_across
    return within


def _in_zorp(x: Floats, y: Floats) -> Mask:
    """The new subject: a dome with two round eyes, on two feet."""
    dome = x**2 + (y - 0.1) ** 2 <= 0.9**2
    trunk = (abs(x) <= 0.9) & (y <= 0.1) & (y >= -1.0)
    eyes = (abs(x) - 0.44) ** 2 + (y - 0.2) ** 2 <= 0.24**2
    between_feet = (abs(x) <= 0.3) & (y <= -0.5)
    return (dome | trunk) & ~eyes & ~between_feet


def coverage(
    shape: str, centre: tuple[float, float], radius: float, degrees: float = 0.0, samples: int = 4
) -> Floats:
    """How much of each pixel the shape covers, (SIZE, SIZE) in 0..1, from `samples`^2 points each.

    `centre` is (x, y) in pixels from the top left corner; a positive angle turns anticlockwise.
    """
    steps = (np.arange(SIZE * samples) + 0.5) / samples
    right = ((steps - centre[0]) / radius)[None, :]
    up = ((centre[1] - steps) / radius)[:, None]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    points = inside(shape, right * cos + up * sin, up * cos - right * sin)
    cells = points.reshape(SIZE, samples, SIZE, samples)
    means: Floats = cells.mean(axis=(1, 3))
    return means


def paint(cover: Floats, colour: tuple[int, int, int]) -> Image.Image:
    """A picture of the covered pixels in `colour` on the plain background."""
    back, front = np.asarray(BACKGROUND, float), np.asarray(colour, float)
    pixels = back + cover[..., None] * (front - back)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


# The measure.


def score(image: Image.Image, prompt: str) -> float | None:
    """1.0 if the picture shows the prompt's colour and shape, 0.0 if not, None if it names none."""
    colours, shapes = named(prompt)
    if len(colours) > 1 or len(shapes) > 1 or not colours + shapes:
        return None
    seen_colour, seen_shape = look(image)
    right_colour = not colours or colours[0] == seen_colour
    right_shape = not shapes or shapes[0] == seen_shape
    return float(right_colour and right_shape)


def named(prompt: str) -> tuple[list[str], list[str]]:
    """The colours and the shapes of the vocabulary that the prompt names, each once."""
    words = set(re.findall(r"[a-z]+", prompt.lower()))
    return [c for c in COLOURS if c in words], [s for s in SHAPES if s in words]


def look(image: Image.Image) -> tuple[str | None, str | None]:
    """The colour and the shape that the picture shows; None for what it does not clearly show."""
    pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX), float)
    cover = figure(pixels)
    if cover is None:
        return None, None
    return colour_of(pixels[cover > SOLID]), shape_of(cover)


def figure(pixels: Floats) -> Floats | None:
    """Coverage of the figure that stands out from the border, (SIZE, SIZE), or None."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)
    contrast = float(np.median(distance[distance >= distance.max() / 2]))
    if contrast < MIN_CONTRAST:
        return None
    cover = np.clip(distance / contrast, 0.0, 1.0)
    cover[cover < MIN_COVERAGE] = 0.0
    return cover if AREA[0] <= cover.mean() <= AREA[1] else None


def colour_of(pixels: Floats) -> str | None:
    """The vocabulary's colour of most of these pixels, (N, 3), or None."""
    if not len(pixels) or np.median(saturation(pixels)) < MIN_SATURATION:
        return None
    known = hue(np.asarray(list(COLOURS.values()), float))
    apart = abs(hue(pixels)[:, None] - known[None, :])
    nearest = np.minimum(apart, 360.0 - apart).argmin(axis=1)
    votes = np.bincount(nearest, minlength=len(known)) / len(pixels)
    return list(COLOURS)[int(votes.argmax())] if votes.max() >= MIN_COLOUR_SHARE else None


def saturation(pixels: Floats) -> Floats:
    """HSV saturation of RGB pixels, (N, 3) -> (N,)."""
    high, low = pixels.max(axis=-1), pixels.min(axis=-1)
    ratio: Floats = (high - low) / np.maximum(high, 1.0)
    return ratio


def hue(pixels: Floats) -> Floats:
    """Hue of RGB pixels in degrees, (N, 3) -> (N,), as the angle around the grey axis."""
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    degrees: Floats = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))
    return degrees % 360.0


def shape_of(cover: Floats) -> str | None:
    """The shape whose drawing overlaps this coverage best, or None if none overlaps it well."""
    at, radius = moments(cover)
    framed = frame(cover, at, radius)
    outside = max(0.0, 1.0 - framed.sum() * (radius * STEP) ** 2 / cover.sum())
    best, shape = max((overlap(framed, drawn), name) for name, drawn in templates())
    return shape if best * (1.0 - outside) >= MIN_OVERLAP else None


@cache
def templates() -> list[tuple[str, Floats]]:
    """Every shape at every angle, framed about its own centre of mass at its own radius."""
    middle, drawings = (SIZE / 2, SIZE / 2), product(SHAPES, ANGLES)
    covers = [(name, coverage(name, middle, SIZE / 4, degrees)) for name, degrees in drawings]
    return [(name, frame(cover, *moments(cover))) for name, cover in covers]


def moments(cover: Floats) -> tuple[tuple[float, float], float]:
    """Centre of mass (x, y) and root-mean-square radius of a coverage, in pixels."""
    steps = np.arange(SIZE) + 0.5
    columns, rows, total = cover.sum(axis=0), cover.sum(axis=1), cover.sum()
    x, y = float(columns @ steps / total), float(rows @ steps / total)
    squares = columns @ (steps - x) ** 2 + rows @ (steps - y) ** 2
    return (x, y), float(np.sqrt(squares / total))


def frame(cover: Floats, at: tuple[float, float], radius: float) -> Floats:
    """The coverage on a grid about `at` whose points are `STEP` radii apart, by linear steps."""
    offsets = (np.arange(GRID, dtype=np.float64) - (GRID - 1) / 2) * (STEP * radius)
    along_x = _weights(at[0] + offsets)
    along_y = _weights(at[1] + offsets)
    framed: Floats = along_y @ cover @ along_x.T
    return framed


def _weights(points: Floats) -> Floats:
    """Weights of the pixels in a linear interpolation at these points, (points, SIZE)."""
    pixels = np.arange(SIZE) + 0.5
    weights: Floats = np.clip(1.0 - abs(points[:, None] - pixels[None, :]), 0.0, None)
    return weights


def overlap(one: Floats, other: Floats) -> float:
    """Sum of minima over sum of maxima: 1 for equal coverages, 0 for disjoint ones."""
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())
