"""Draws the pictures of the quickstart: coloured shapes with captions, the same for the same seed.

    python recipes/quickstart/draw.py

writes, beside this file, `shapes/` (the base's own shapes, for `quickstart-full.toml`), `subject/`
(the new subject in every colour, near the middle) and `keep/` (each old shape in each colour, so
that the adapter does not forget them). A picture's caption is in the .txt file of the same name.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.scores.shapes import BASE_SHAPES, COLOURS, SIZE, SUBJECT, coverage, paint

HERE = Path(__file__).parent
CAPTIONS = ("a {colour} {shape}", "a drawing of a {colour} {shape}", "{colour} {shape}")
Pair = tuple[str, str]  # colour, shape


def draw(pair: Pair, rng: np.random.Generator, variety: float = 1.0) -> Image.Image:
    """One shape at a random place, size and angle, its colour off by a little.

    `variety` from 1 (anywhere) to 0 (always the same, in the middle).
    """
    colour, shape = pair
    radius = 17.0 + variety * rng.uniform(-3.0, 3.0)
    room = SIZE / 2 - 1.2 * radius  # no shape reaches farther than 1.2 radii
    x, y = SIZE / 2 + variety * rng.uniform(-room, room, size=2)
    shade = np.clip(np.asarray(COLOURS[colour]) + rng.uniform(-10, 10, size=3), 0, 255)
    degrees = variety * rng.uniform(-8.0, 8.0)
    cover = coverage(shape, (float(x), float(y)), radius, degrees)
    return paint(cover, (int(shade[0]), int(shade[1]), int(shade[2])))


def caption(pair: Pair, rng: np.random.Generator) -> str:
    """One of the ways to name the pair; the plain one half the time."""
    text = str(rng.choice(CAPTIONS, p=(0.5, 0.25, 0.25)))
    return text.format(colour=pair[0], shape=pair[1])


def pairs(colours: Iterable[str], shapes: Iterable[str]) -> list[Pair]:
    """Every colour with every shape."""
    return [(colour, shape) for shape in shapes for colour in colours]


def write(folder: Path, wanted: list[Pair], seed: int, variety: float = 1.0) -> None:
    """Draw each wanted pair into `folder`, in place of the pictures that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.png"), *folder.glob("*.txt")]:
        old.unlink()
    rng = np.random.default_rng(seed)
    for index, pair in enumerate(wanted):
        name = f"{index:03d}-{pair[0]}-{pair[1]}"
        draw(pair, rng, variety).save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(caption(pair, rng) + "\n", encoding="ascii")


def main() -> None:
    base = pairs(COLOURS, BASE_SHAPES)
    write(HERE / "shapes", base * 12, seed=1)
    write(HERE / "subject", pairs(COLOURS, [SUBJECT]) * 6, seed=2, variety=0.4)
    write(HERE / "keep", base, seed=3)


if __name__ == "__main__":
    main()
