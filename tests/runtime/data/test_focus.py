"""Cuts around faces and salient parts: drawn pictures whose right answer is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image, ImageDraw, ImageFilter

from compiler.data.geometry import place
from compiler.plan import Geometry
from runtime.data import focus
from runtime.data.cache import Cache
from runtime.data.feed import Feed, frames
from runtime.data.fill import OFFSET, fill_latents, fill_text
from runtime.data.located import sample_keys
from runtime.data.pixels import decode, decode_placed
from runtime.errors import MachineUnfit
from runtime.events import Silent
from tests.compiler.data.pictures import encoded
from tests.runtime.data.fed import set_up

opencv = pytest.mark.skipif(
    importlib.util.find_spec("cv2") is None, reason="OpenCV, the extra `crop`, is not installed"
)
CPU = torch.device("cpu")


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).normal(150, 4, (height, width))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")


def face(size: int) -> Image.Image:
    """Light and shade where Haar features look for them: hair, brows, eyes, nose, mouth."""
    image = Image.new("L", (400, 400), 150)
    draw = ImageDraw.Draw(image)
    draw.ellipse((70, 20, 330, 390), fill=205)
    draw.pieslice((60, 0, 340, 240), 180, 360, fill=70)
    draw.ellipse((80, 60, 320, 220), fill=205)
    for x in (145, 255):
        draw.rectangle((x - 40, 140, x + 40, 152), fill=70)
        draw.ellipse((x - 36, 160, x + 36, 196), fill=110)
        draw.ellipse((x - 15, 164, x + 15, 192), fill=30)
    draw.polygon([(200, 180), (180, 265), (220, 265)], fill=225)
    draw.ellipse((175, 255, 225, 275), fill=140)
    draw.ellipse((145, 300, 255, 335), fill=110)
    return image.filter(ImageFilter.GaussianBlur(6)).resize((size, size)).convert("RGB")


def portrait(width: int, height: int, x: int, y: int, size: int) -> Image.Image:
    image = noise(width, height)
    image.paste(face(size), (x, y))
    return image


def rule(crop: str, **changes: object) -> Geometry:
    values = {"resolution": 128.0, "resolution_type": "pixel", "aspect": "square", "multiple": 32}
    return Geometry(**(values | {"crop": crop} | changes))  # type: ignore[arg-type]


@opencv
@pytest.mark.parametrize(
    ("width", "height", "x", "y", "size"),
    [(800, 400, 560, 100, 200), (800, 400, 20, 60, 220), (400, 900, 100, 650, 200)],
)
def test_the_cut_has_the_face_in_its_middle(
    width: int, height: int, x: int, y: int, size: int
) -> None:
    middle = focus.find(portrait(width, height, x, y, size), "face")
    assert middle is not None
    assert abs(middle[0] * width - (x + size / 2)) < 0.1 * size
    assert abs(middle[1] * height - (y + size / 2)) < 0.1 * size


@opencv
def test_of_two_faces_the_larger_counts() -> None:
    image = portrait(900, 400, 40, 120, 160)
    image.paste(face(280), (560, 60))
    middle = focus.find(image, "face")
    assert middle is not None and abs(middle[0] * 900 - 700) < 30


@opencv
def test_the_cut_holds_what_strikes_the_eye() -> None:
    for x in (20, 300, 640):
        image = noise(800, 200)
        ImageDraw.Draw(image).ellipse((x, 60, x + 90, 150), fill=(255, 30, 30))
        middle = focus.find(image, "saliency")
        assert middle is not None and abs(middle[0] * 800 - (x + 45)) < 15


@opencv
def test_where_nothing_is_found_the_cut_stays() -> None:
    for crop in ("face", "saliency"):
        placed = place(300, 200, rule(crop))
        assert placed.focus == crop
        assert focus.focused(Image.new("RGB", (300, 200), "grey"), placed) == placed
        assert focus.focused(Image.new("RGB", (300, 3)), placed) == placed


@opencv
@pytest.mark.parametrize("mirrored", [False, True])
def test_pixels_come_from_the_offset_that_is_told(mirrored: bool) -> None:
    """The found offset, given as a plain cut, gives the same pixels."""
    image = portrait(400, 200, 250, 30, 140)
    placed = evolve(place(400, 200, rule("face")), mirrored=mirrored)
    pixels, found = decode_placed(encoded(image, "PNG"), placed, image.size)
    assert found.crop_x > placed.crop_x + 20 and found.crop_x <= 128
    plain = evolve(found, focus="", mirrored=False)
    expected = decode(encoded(image, "PNG"), plain, image.size)
    assert np.array_equal(pixels, expected[:, ::-1] if mirrored else expected)


@opencv
def test_the_offset_is_cached_beside_the_latents(tmp_path: Path) -> None:
    (tmp_path / "dogs").mkdir()
    (tmp_path / "cats").mkdir()
    portrait(400, 200, 250, 30, 140).save(tmp_path / "dogs" / "a.png")
    noise(200, 200).save(tmp_path / "dogs" / "b.png")  # nothing to choose: no focus
    noise(128, 128).save(tmp_path / "cats" / "c.png")
    plan, manifest, family = set_up(
        tmp_path, edit=lambda source: evolve(source, geometry=rule("face"))
    )
    cache = Cache(Path(plan.cache_folder))
    fill_text(plan, manifest, family, cache, Silent())
    fill_latents(plan, manifest, family, cache, Silent())
    keys = sample_keys(plan, manifest, family, cache)
    entries = {manifest.name(row): cache.get(key) for row, key in enumerate(keys)}
    _, found = decode_placed(
        (tmp_path / "dogs" / "a.png").read_bytes(), manifest.placement(0), (400, 200)
    )
    assert entries["dogs/a.png"][OFFSET].tolist() == [found.crop_x, found.crop_y]
    assert OFFSET not in entries["dogs/b.png"] and OFFSET not in entries["cats/c.png"]
    windows = list(Feed(plan, manifest, family, cache, CPU).windows(0))
    assert len(windows) == plan.steps.total


def test_a_machine_without_opencv_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dogs").mkdir()
    (tmp_path / "cats").mkdir()
    for name in ("dogs/a.png", "cats/b.png"):
        noise(300, 150).save(tmp_path / name)
    plan, manifest, family = set_up(
        tmp_path, edit=lambda source: evolve(source, geometry=rule("saliency"))
    )
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "runtime.data.focus.importlib.util.find_spec",
        lambda name: None if name == "cv2" else real(name),
    )
    with pytest.raises(MachineUnfit, match="need OpenCV") as caught:
        fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent())
    assert "pip install" in caught.value.help and family.loaded == []


@opencv
def test_models_are_told_where_the_pixels_were_cut(tmp_path: Path) -> None:
    """What is told, taken as a place in the scaled (and mirrored) picture, has the very pixels."""
    (tmp_path / "dogs").mkdir()
    (tmp_path / "cats").mkdir()
    portrait(400, 200, 250, 30, 140).save(tmp_path / "dogs" / "a.png")
    noise(300, 200).save(tmp_path / "cats" / "c.png")
    geometry = rule("face", flip=True)
    plan, manifest, family = set_up(tmp_path, edit=lambda source: evolve(source, geometry=geometry))
    cache = Cache(Path(plan.cache_folder))
    fill_latents(plan, manifest, family, cache, Silent())
    located = cache.locate(sample_keys(plan, manifest, family, cache))
    told = frames(manifest, np.arange(len(manifest)), cache, located)
    assert len(told) == 4
    lefts = {}
    for row, frame in enumerate(told):
        data, sample = Path(manifest.item(row).file).read_bytes(), manifest[row]
        cut, size = sample.placement, (sample.width, sample.height)
        pixels, _ = decode_placed(data, cut, size)
        edges = {"width": cut.resize_width, "height": cut.resize_height}
        scaled = decode(data, evolve(cut, crop_x=0, crop_y=0, focus="", **edges), size)
        (top, left), (height, width) = frame.crop, frame.target
        assert (height, width) == pixels.shape[:2] and frame.original == size[::-1]
        expected = scaled[top : top + height, left : left + width].astype(int)
        assert np.abs(expected - pixels).max() <= 2, "scaled whole or in part: rounding"
        lefts[manifest.name(row)] = left
    spare = 256 - 128
    assert lefts["dogs/a.png"] > spare // 2 + 20, "the cut was moved to the face"
    assert lefts["dogs/a.png (mirrored)"] == spare - lefts["dogs/a.png"]
