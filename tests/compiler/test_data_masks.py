"""Masks in the plan: found by name, checked, and never trained as pictures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from compiler.compile import Compiled
from compiler.data.manifest import Manifest
from compiler.plan import Mask, Plan
from tests.compiler.recipes import RECIPE, codes, compiled, make_pictures, project

PLACE = 'captions = { from = "instance", prompt = "a photo of sks dog" }'


def made(result: Compiled) -> tuple[Plan, Manifest]:
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    return result.plan, result.manifest


def masked(tmp_path: Path, mask: str) -> Path:
    path = project(tmp_path, RECIPE.replace(PLACE, f"{PLACE}\nmask = {{ {mask} }}"))
    os.rename(tmp_path / "pictures" / "004.png", tmp_path / "pictures" / "004-mask.png")
    make_pictures(tmp_path / "masks", [(64, 64)] * 4)
    return path


def test_alpha(tmp_path: Path) -> None:
    plan, manifest = made(compiled(masked(tmp_path, 'from = "alpha", floor = 0.25')))
    assert plan.sources[0].mask == Mask(kind="alpha", floor=0.25)
    assert len(manifest) == 5 and all(sample.mask == "" for sample in manifest)
    values = {d.key: d.value for d in plan.decisions}
    assert values["data.source[0].mask.floor"] == "0.25"


def test_opaque_pictures_have_no_such_masks(tmp_path: Path) -> None:
    """One that may be transparent is enough to say nothing; many are looked at in part."""
    path = masked(tmp_path, 'from = "alpha"')
    (fault,) = compiled(path).diagnostics
    assert (fault.code, fault.severity) == ("opaque-images", "warning")
    assert "no image in `pictures` has transparency (all looked at)" in fault.message
    Image.new("LA", (64, 64)).save(tmp_path / "pictures" / "002.png")
    assert compiled(path).diagnostics == ()
    Image.new("P", (64, 64)).save(tmp_path / "pictures" / "002.png", transparency=3)
    assert compiled(path).diagnostics == ()
    make_pictures(tmp_path / "pictures", [(64, 64)] * 130)
    (fault,) = compiled(path).diagnostics
    assert fault.code == "opaque-images" and "44 of them looked at" in fault.message


def test_a_folder_of_masks(tmp_path: Path) -> None:
    path = masked(tmp_path, 'from = "file", folder = "masks", missing = "whole"')
    plan, manifest = made(compiled(path))
    assert plan.sources[0].mask == Mask(
        kind="file", floor=0.0, folder=str(tmp_path / "masks"), missing="whole"
    )
    assert [sample.mask for sample in manifest] == [f"00{n}.png" for n in range(4)] + [""]
    assert [manifest.mask(row) for row in range(5)] == [sample.mask for sample in manifest]


def test_masks_beside_and_below(tmp_path: Path) -> None:
    path = masked(tmp_path, 'from = "file", suffix = "-mask", missing = "whole"')
    os.rename(tmp_path / "pictures/004-mask.png", tmp_path / "pictures/002-mask.png")
    _, manifest = made(compiled(path))
    assert {s.key: s.mask for s in manifest} == {
        f"00{n}.png": "002-mask.png" if n == 2 else "" for n in range(4)
    }
    os.rename(tmp_path / "pictures/002-mask.png", tmp_path / "pictures/003-mask.png")
    os.rename(tmp_path / "masks", tmp_path / "pictures" / "m")
    path.write_text(path.read_text().replace('suffix = "-mask"', 'folder = "pictures/m"'))
    _, manifest = made(compiled(path))
    assert [s.key for s in manifest] == [
        "000.png", "001.png", "002.png", "003-mask.png", "003.png",
    ]  # fmt: skip
    assert [s.mask for s in manifest] == ["000.png", "001.png", "002.png", "", "003.png"]


def test_the_list_of_samples_keeps_masks(tmp_path: Path) -> None:
    path = masked(tmp_path, 'from = "file", folder = "masks", missing = "whole"')
    _, manifest = made(compiled(path))
    manifest.save(tmp_path / "list.jsonl")
    again = Manifest.load(tmp_path / "list.jsonl")
    assert list(again) == list(manifest) and again.digest == manifest.digest
    os.rename(tmp_path / "masks" / "003.png", tmp_path / "masks" / "004-mask.png")
    assert made(compiled(path))[1].digest != manifest.digest


@pytest.mark.parametrize(
    ("mask", "code", "words"),
    [
        ('from = "file"', "missing-key", 'suffix = "-mask"'),
        ('from = "file", folder = "pictures"', "missing-key", 'suffix = "-mask"'),
        ('from = "file", folder = "none"', "missing-path", "relative to the recipe"),
        ('from = "file", folder = "recipe.toml"', "missing-path", ""),
        ('from = "file", folder = "masks"', "missing-masks", "004-mask.png"),
        ('from = "file", suffix = "_", missing = "whole"', "missing-masks", "000.png"),
        ('from = "alpha", suffix = "_"', "no-effect", ""),
        ('from = "alpha", missing = "error"', "no-effect", ""),
        ('from = "alpha", floor = 1.0', "out-of-range", ""),
        ("floor = 0.5", "missing-key", ""),
    ],
)
def test_what_is_refused(tmp_path: Path, mask: str, code: str, words: str) -> None:
    result = compiled(masked(tmp_path, mask))
    assert result.plan is None and codes(result) == [code]
    assert words in result.diagnostics[0].help


def test_two_masks_and_odd_sizes(tmp_path: Path) -> None:
    path = masked(tmp_path, 'from = "file", folder = "masks", missing = "whole"')
    make_pictures(tmp_path / "more", [(64, 64)])
    os.rename(tmp_path / "more" / "000.png", tmp_path / "masks" / "000.webp")
    result = compiled(path)
    assert codes(result) == ["missing-masks"] and "several" in result.diagnostics[0].message
    (tmp_path / "masks" / "000.webp").unlink()
    make_pictures(tmp_path / "masks", [(64, 32)])
    result = compiled(path)
    assert codes(result) == ["mask-size"] and "64x32" in result.diagnostics[0].message


def of_two(tmp_path: Path, default: str, first: str, second: str) -> Compiled:
    """Two sources of the same pictures with `[data] mask = default` and these entries."""
    path = masked(tmp_path, 'from = "alpha"')
    text = path.read_text().replace('mask = { from = "alpha" }', first)
    head, tail = text.split("[[data.source]]")
    again = f'[[data.source]]\nid = "b"\npath = "pictures"\n{PLACE}\n{second}\n\n[train]'
    tail = tail.replace("[train]", again, 1)
    path.write_text(head.replace("[data]", f"[data]\n{default}") + "[[data.source]]" + tail)
    return compiled(path)


def test_masks_for_all_sources(tmp_path: Path) -> None:
    default = 'mask = { from = "file", folder = "masks", missing = "whole", floor = 0.1 }'
    whole = Mask(kind="file", floor=0.1, folder=str(tmp_path / "masks"), missing="whole")
    plan, manifest = made(of_two(tmp_path, default, "", 'mask = "none"'))
    assert [source.mask for source in plan.sources] == [whole, None]
    assert [bool(sample.mask) for sample in manifest] == [True] * 4 + [False] * 6
    values = {d.key: (d.value, d.source) for d in plan.decisions}
    assert values["data.mask.floor"][0] == "0.1"
    assert values["data.source[0].mask.floor"] == ("0.1", "inherited")
    assert values["data.source[1].mask"][0] == "none"


def test_a_source_completes_its_own_masks(tmp_path: Path) -> None:
    """Key by key, but nothing of files for masks that are no files."""
    default = 'mask = { from = "file", folder = "masks", missing = "whole", floor = 0.1 }'
    own = 'mask = { from = "file", floor = 0.3 }'
    plan, _ = made(of_two(tmp_path, default, own, 'mask = { from = "alpha" }'))
    assert [source.mask for source in plan.sources] == [
        Mask(kind="file", floor=0.3, folder=str(tmp_path / "masks"), missing="whole"),
        Mask(kind="alpha", floor=0.1),
    ]
    keys = [decision.key for decision in plan.decisions]
    assert len(keys) == len(set(keys))
    values = {d.key: (d.value, d.source) for d in plan.decisions}
    assert values["data.source[0].mask.missing"] == ("whole", "inherited")
    assert values["data.source[1].mask.floor"] == ("0.1", "inherited")


@pytest.mark.parametrize(
    ("default", "code", "path"),
    [
        ('mask = { from = "file" }', "missing-key", "data.mask"),
        ('mask = { from = "file", folder = "gone" }', "missing-path", "data.mask.folder"),
        ('mask = { from = "file", folder = "masks" }', "missing-masks", "data.mask"),
        ('mask = { from = "alpha", suffix = "_" }', "no-effect", "data.mask.suffix"),
        ('mask = "none"', "wrong-type", "data.mask"),
    ],
)
def test_what_is_refused_of_all_sources(tmp_path: Path, default: str, code: str, path: str) -> None:
    result = of_two(tmp_path, default, "", "")
    assert result.plan is None and {*codes(result)} == {code}
    assert {fault.path for fault in result.diagnostics} == {path}
