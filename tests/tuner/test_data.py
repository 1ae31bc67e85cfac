"""`tuner data`: the page holds what the plan says, escaped, and no more pictures than asked for."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compiler.compile import Compiled
from compiler.plan import Mask
from runtime.data.looks import shown, some_of
from tests.compiler.recipes import RECIPE, compiled, make_pictures, project
from tuner import data, data_page
from tuner.cli import run_command
from tuner.exits import DONE, REFUSED

PLACE = 'captions = { from = "instance", prompt = "a photo of sks dog" }'
CAPTIONS = (
    'captions = { from = "instance", prompt = "<b>, on grass, in sun", shuffle = true, '
    "variants = 5, dropout = 0.1 }\nmin_size = 60\nholdout = 1"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, compiled as tests do."""

    def compile_here(path: Path, overrides: list[str], **_: object) -> Compiled:
        return compiled(path, *overrides)

    monkeypatch.setattr(data, "compile_here", compile_here)
    monkeypatch.chdir(tmp_path)
    project(tmp_path, RECIPE.replace(PLACE, CAPTIONS))
    make_pictures(tmp_path / "pictures" / "more", [(64, 64)] * 20 + [(128, 64)] * 2 + [(16, 16)])
    return tmp_path


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def test_the_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["data", "recipe.toml", "--most", "6"]) == DONE
    assert capsys.readouterr().out.strip() == "try-data.html"
    page = Path("try-data.html").read_text(encoding="utf-8")
    assert [picture.shape for picture in pictures(page)] == [(64, 64, 3)] * 6 + [(48, 88, 3)] * 2
    assert "&lt;b&gt;, " in page and "<b>," not in page and "other form" in page
    assert "an edge below 60 pixels" in page and "no caption in 10% of uses" in page
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert "6 of 24 images" in page or "6 of 25 images" in page
    assert re.search(r"Left out</h2>.*an edge below 60 pixels", page, re.DOTALL)


def test_all_that_is_left_out_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        (Path("pictures") / f"broken<{number}>.png").write_bytes(b"no picture")
    recipe = Path("recipe.toml")
    recipe.write_text(recipe.read_text().replace("[[data", 'broken = "skip"\n[[data', 1))
    assert run_command(["data", "recipe.toml", "--most", "1"]) == DONE
    page, said = Path("try-data.html").read_text(encoding="utf-8"), capsys.readouterr().err
    left_out = page.split("Left out</h2>")[1].split("<h2>")[0]
    for number in range(12):
        assert f"broken&lt;{number}&gt;.png" in left_out
    assert "<summary>12 names</summary>" in left_out  # many are folded away,
    assert "more/022.png</span>" in left_out  # a single one is not
    assert "<p class='small soft'></p>" not in page
    assert said.count(".png: not an image") == 8 and "and 4 more" in said


def test_the_histogram_counts_each_image_once(tmp_path: Path) -> None:
    """By the shorter edge, however often an image is a sample; half an octave each."""
    path = project(tmp_path, RECIPE.replace(PLACE, f"{PLACE}\nflip = true\nrepeats = 2"))
    shutil.rmtree(tmp_path / "pictures")
    sizes = [(64, 64)] * 5 + [(70, 200)] * 2 + [(128, 129)] + [(400, 300)] * 3
    make_pictures(tmp_path / "pictures", sizes)
    result = compiled(path)
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    shown_ = data_page._sizes(result.manifest)
    counts = re.findall(r"(\d+) to (\d+)</td>.*?>(\d+)</td></tr>", shown_, re.DOTALL)
    assert [(int(low), int(high), int(count)) for low, high, count in counts] == [
        (64, 91, 7),
        (91, 128, 0),
        (128, 181, 1),
        (181, 256, 0),
        (256, 362, 3),
    ]
    assert "64 to 300 pixels" in shown_


def test_a_wrong_recipe_writes_no_page(here: Path) -> None:
    assert run_command(["data", "recipe.toml", "--set", "data.resolution=3"]) == REFUSED
    assert not Path("try-data.html").exists()


def test_what_a_mask_hides_is_grey(tmp_path: Path) -> None:
    from attrs import evolve

    plan, manifest = (lambda made: (made.plan, made.manifest))(compiled(project(tmp_path)))
    assert plan is not None and manifest is not None
    half = Image.new("RGBA", (64, 64), (250, 0, 0, 255))
    half.paste((250, 0, 0, 0), (32, 0, 64, 64))
    half.save(tmp_path / "pictures" / "002.png")
    (tmp_path / "pictures" / "003.png").write_bytes(b"rubbish")
    rules = Mask(kind="alpha", floor=0.0)
    plan = evolve(plan, sources=(evolve(plan.sources[0], mask=rules),))
    looks = list(shown(plan, manifest, [2, 3]))
    assert looks[0].share == 0.5 and looks[1].address == "" and "broken" in looks[1].why
    pixels = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(looks[0].address.partition(",")[2])))
    ).astype(int)
    assert abs(pixels[32, 8] - (250, 0, 0)).max() < 20
    assert abs(pixels[32, 56] - (0.2 * 255 + 0.8 * 128)).max() < 20  # transparency lies on white


def test_some_are_chosen_by_the_seed() -> None:
    rows = list(range(100))
    assert some_of(rows, 200, 1) == rows and some_of(rows, 10, 1) == some_of(rows[::-1], 10, 1)
    assert len(set(some_of(rows, 10, 1))) == 10 and some_of(rows, 10, 1) != some_of(rows, 10, 2)
