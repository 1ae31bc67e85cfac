"""What a recipe says of sizes and cuts, from the file to the plan."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from attrs import evolve

from compiler.compile import Compiled
from compiler.data.manifest import Manifest
from compiler.machine import OPENCV
from compiler.plan import Plan
from tests.compiler.recipes import MACHINE, RECIPE, codes, compiled, make_pictures, project

SIZES = [(64, 64), (96, 64), (64, 96), (128, 64), (200, 300)]


def mixed(folder: Path, data: str, source: str = "") -> Path:
    """A project with pictures of `SIZES` instead of equal ones; lines of [data] and its source."""
    recipe = RECIPE.replace("resolution = 64", data).replace("batch_size = 2", "batch_size = 1")
    path = project(folder, recipe.replace('path = "pictures"', f'path = "mixed"\n{source}'))
    make_pictures(folder / "mixed", SIZES)
    return path


def made(result: Compiled) -> tuple[Plan, Manifest]:
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    return result.plan, result.manifest


def buckets(plan: Plan) -> list[tuple[str, int, int, int]]:
    return [(b.source, b.width, b.height, b.images) for b in plan.buckets]


def test_each_image_is_a_sample_of_each_resolution(tmp_path: Path) -> None:
    path = mixed(tmp_path, 'resolution = [64, 128]\ncrop = { aspect = "square" }')
    plan, manifest = made(compiled(path))
    assert buckets(plan) == [("mixed@64", 64, 64, 5), ("mixed@128", 128, 128, 5)]
    assert [source.geometry.resolution for source in plan.sources] == [64.0, 128.0]
    seen = Counter((sample.source, sample.key) for sample in manifest)
    assert seen == {(s, f"{n:03}.png"): 1 for s in range(2) for n in range(5)}
    assert plan.steps.per_epoch == 10
    decided = {d.key: d for d in plan.decisions}
    assert decided["data.resolution"].value == "64, 128"


def test_resolutions_of_a_source_beside_another(tmp_path: Path) -> None:
    path = mixed(tmp_path, "resolution = 64", "resolution = [64, 128]\nmin_size = 100")
    more = '[[data.source]]\npath = "pictures"\n'
    more += 'captions = { from = "instance", prompt = "b" }\n\n[train]'
    path.write_text(path.read_text().replace("[train]", more, 1))
    result = compiled(path)
    plan, _ = made(result)
    assert [source.id for source in plan.sources] == ["mixed@64", "mixed@128", "pictures"]
    assert [source.skipped for source in plan.sources] == [4, 4, 0]
    assert result.outlook is not None
    rows = [(row.source, row.images) for row in result.outlook.skipped]
    assert rows == [("mixed@64", 4), ("mixed@128", 4)]


def test_mirrored_samples_are_counted(tmp_path: Path) -> None:
    plan, manifest = made(compiled(mixed(tmp_path, "resolution = 64\nflip = true")))
    assert plan.sources[0].images == len(manifest) == 10 == plan.steps.samples_per_epoch
    for row in range(0, 10, 2):
        one, other = manifest[row], manifest[row + 1]
        assert one.key == other.key and one.captions == other.captions
        assert (one.placement.mirrored, other.placement.mirrored) == (False, True)


def test_the_nearest_of_the_listed_ratios(tmp_path: Path) -> None:
    crop = 'crop = { aspect = "closest", buckets = ["1:1", "2:1"] }'
    plan, _ = made(compiled(mixed(tmp_path, f'resolution = 64\nresolution_type = "pixel"\n{crop}')))
    assert buckets(plan) == [("mixed", 64, 64, 3), ("mixed", 128, 64, 2)]  # 96x64: sqrt(2) < 1.5
    crop = crop.replace("closest", "random")
    path = mixed(tmp_path / "other", f"resolution = 64\n{crop}")
    assert made(compiled(path))[1].digest == made(compiled(path))[1].digest


@pytest.mark.parametrize(
    ("data", "code", "key", "words"),
    [
        ('crop = { aspect = "closest" }', "missing-key", "data.crop.aspect", "buckets = ["),
        ('crop = { buckets = ["1:1"] }', "no-effect", "data.crop.buckets", 'aspect = "closest"'),
        (
            'crop = { aspect = "random", buckets = ["1:1", "3x2"] }',
            "bad-ratio",
            "data.crop.buckets[1]",
            "follows from `resolution`",
        ),
        ("max_size = 100", "no-effect", "data.max_size", 'resize = "none"'),
        ("min_aspect = 2\nmax_aspect = 1", "conflict", "data.min_aspect", "min_aspect = 1"),
        ('crop = { resize = "none" }', "crop-too-large", "data.crop.resize", "upscale = false"),
    ],
)
def test_what_is_refused(tmp_path: Path, data: str, code: str, key: str, words: str) -> None:
    result = compiled(mixed(tmp_path, f"resolution = 96\n{data}"))
    faults = [fault for fault in result.diagnostics if fault.severity == "error"]
    assert [(fault.code, fault.path) for fault in faults] == [(code, key)]
    assert words in faults[0].help


@pytest.mark.parametrize("value", ["[]", "[64, 64]", "[64, 4]", "[64, 100000]"])
def test_lists_of_resolutions_that_are_refused(tmp_path: Path, value: str) -> None:
    result = compiled(mixed(tmp_path, f"resolution = {value}"))
    (fault,) = result.diagnostics
    assert fault.path == "data.resolution" and fault.code in ("out-of-range", "conflict")


def test_pictures_below_their_bucket(tmp_path: Path) -> None:
    rule = 'resolution = 96\ncrop = { aspect = "square" }'
    result = compiled(mixed(tmp_path, rule))
    assert "upscaled" in codes(result) and made(result)[0].sources[0].images == 5
    result = compiled(mixed(tmp_path / "b", f"{rule}\nupscale = false"))
    plan, manifest = made(result)
    assert codes(result) == ["too-small"] and [s.key for s in manifest] == ["004.png"]
    assert (plan.sources[0].images, plan.sources[0].skipped) == (1, 4)
    result = compiled(mixed(tmp_path / "c", f"{rule}\nupscale = false", "resolution = [64, 96]"))
    plan, _ = made(result)  # each resolution for itself
    assert [(s.images, s.skipped) for s in plan.sources] == [(5, 0), (1, 4)]


def test_cut_at_their_own_size(tmp_path: Path) -> None:
    rule = 'resolution = 64\nmax_size = 100\ncrop = { aspect = "square", resize = "none" }'
    plan, manifest = made(compiled(mixed(tmp_path, rule)))
    sizes = [(s.placement.resize_width, s.placement.resize_height) for s in manifest]
    assert sizes == [*SIZES[:4], (100, 150)]
    assert plan.sources[0].geometry.max_size == 100


def test_shapes_that_are_left_out(tmp_path: Path) -> None:
    result = compiled(mixed(tmp_path, "resolution = 64\nmin_aspect = 1\nmax_aspect = 1.5"))
    plan, manifest = made(result)
    assert [sample.key for sample in manifest] == ["000.png", "001.png"]
    assert codes(result).count("out-of-aspect") == 2 and plan.sources[0].skipped == 3
    assert result.outlook is not None
    assert [row.images for row in result.outlook.skipped] == [2, 1]


def test_a_line_of_pixels_is_handled_as_the_recipe_says(tmp_path: Path) -> None:
    path = mixed(tmp_path, "resolution = 64")
    make_pictures(tmp_path / "mixed" / "thin", [(1, 900), (900, 1)])
    result = compiled(path)
    assert result.plan is None and codes(result) == ["broken-images"]
    said = " ".join(result.diagnostics[0].notes)
    assert "1x900 pixels are more elongated than 16:1" in said and "900x1" in said
    result = compiled(path, "data.broken=skip")
    plan, manifest = made(result)
    assert len(manifest) == plan.sources[0].images == 5 and plan.sources[0].skipped == 2
    assert result.outlook is not None
    assert sorted(row.why for row in result.outlook.skipped) == [
        "1x900 pixels are more elongated than 16:1",
        "900x1 pixels are more elongated than 16:1",
    ]


def test_a_crop_whose_package_is_missing(tmp_path: Path) -> None:
    path = mixed(tmp_path, 'resolution = 64\ncrop = { style = "face" }')
    assert codes(compiled(path)) == []
    result = compiled(path, machine=evolve(MACHINE, missing=(OPENCV,)))
    (fault,) = result.diagnostics
    assert (fault.code, fault.severity, fault.path) == (
        "missing-package",
        "warning",
        "data.crop.style",
    )
    assert fault.help == 'pip install "tuner[crop]"' and made(result)
    focus = {sample.key: sample.placement.focus for sample in made(result)[1]}
    assert focus["000.png"] == "" and focus["004.png"] == "face"
