"""The quickstart's measure of prompt following, against drawings whose content is known."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from runtime.scores.shapes import BACKGROUND, COLOURS, SHAPES, SIZE, coverage, look, paint, score

PAIRS = tuple(product(COLOURS, SHAPES))


def drawing(colour: str, shape: str, rng: np.random.Generator) -> Image.Image:
    """The shape at a random place, size, angle and shade, all of it in the picture."""
    radius = float(rng.uniform(12.0, 21.0))
    x, y = rng.uniform(1.2 * radius, SIZE - 1.2 * radius, size=2)
    red, green, blue = np.clip(np.asarray(COLOURS[colour]) + rng.integers(-12, 13, size=3), 0, 255)
    cover = coverage(shape, (float(x), float(y)), radius, float(rng.uniform(-10, 10)))
    return paint(cover, (int(red), int(green), int(blue)))


def drawings(seed: int, each: int) -> list[tuple[tuple[str, str], Image.Image]]:
    rng = np.random.default_rng(seed)
    return [(pair, drawing(*pair, rng)) for pair in PAIRS * each]


@pytest.mark.parametrize("blur", [0.0, 0.8, 1.6])
def test_drawings_score_for_their_own_pair_and_for_no_other(blur: float) -> None:
    confusion = Counter(
        (pair, look(image.filter(ImageFilter.GaussianBlur(blur)))) for pair, image in drawings(1, 2)
    )
    right = sum(count for (drawn, seen), count in confusion.items() if drawn == seen)
    assert right >= 0.99 * confusion.total()


def test_compression_noise_and_resizing_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    right = []
    for pair, image in drawings(3, 1):
        noisy = np.asarray(image, float) + rng.normal(0.0, 6.0, (SIZE, SIZE, 3))
        larger = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).resize((256, 256))
        right.append(look(larger) == pair)
    assert np.mean(right) >= 0.99


def test_wrong_colour_and_wrong_shape_score_zero() -> None:
    image = paint(coverage("star", (30.0, 33.0), 17.0), COLOURS["green"])
    assert score(image, "A drawing of a GREEN star.") == 1.0
    assert score(image, "a green circle") == 0.0
    assert score(image, "a red star") == 0.0
    assert score(image, "a star") == 1.0
    assert score(image, "green") == 1.0


@pytest.mark.parametrize("prompt", ["", "a picture of a dog", "starred greenish crosses"])
def test_a_prompt_without_the_vocabulary_has_no_score(prompt: str) -> None:
    assert score(Image.new("RGB", (64, 64), BACKGROUND), prompt) is None


def test_a_prompt_for_two_things_has_no_score() -> None:
    image = paint(coverage("cross", (32.0, 32.0), 16.0), COLOURS["red"])
    assert score(image, "a red cross and a blue circle") is None


def test_blank_and_noise_score_zero() -> None:
    rng = np.random.default_rng(4)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8))
    smooth = noise.filter(ImageFilter.GaussianBlur(4))
    pictures = [noise, smooth, *(Image.new("RGB", (64, 64), c) for c in ("white", "black", "red"))]
    for image, shape in product(pictures, SHAPES):
        assert score(image, f"a red {shape}") == 0.0


def test_a_smear_and_a_pair_of_shapes_have_no_shape() -> None:
    smear = paint(coverage("square", (32.0, 32.0), 14.0), COLOURS["red"]).resize((64, 20))
    flat = Image.new("RGB", (64, 64), BACKGROUND)
    flat.paste(smear, (0, 22))
    assert look(flat) == ("red", None)
    two = np.maximum(coverage("circle", (16, 16), 10.0), coverage("circle", (48, 48), 10.0))
    assert look(paint(two, COLOURS["blue"])) == ("blue", None)


def test_a_figure_of_two_colours_has_no_colour() -> None:
    left = coverage("circle", (32.0, 32.0), 18.0)
    pixels = np.array(paint(left, COLOURS["red"]))
    pixels[:, 32:] = np.asarray(paint(left, COLOURS["blue"]))[:, 32:]
    assert look(Image.fromarray(pixels)) == (None, "circle")


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="`blob` is not one of"):
        coverage("blob", (32.0, 32.0), 10.0)
