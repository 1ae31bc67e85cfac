"""Broken recipes of many kinds: one mistake gives one message, at the right place, that helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.compile import Compiled
from compiler.diagnostics import Diagnostic, render
from tests.compiler.broken import GOOD, ROWS, Row
from tests.compiler.recipes import FixedMemory, compiled, make_pictures, project
from tuner.compiling import exit_code
from tuner.exits import DONE, REFUSED

PRESETS = Path(__file__).parents[2] / "recipes" / "presets"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good recipe, and all the files that the broken ones speak of."""
    folder = tmp_path_factory.mktemp("broken")
    project(folder, GOOD)
    make_pictures(folder / "more", [(64, 64)] * 4)
    make_pictures(folder / "damaged", [(64, 64)] * 4)
    (folder / "damaged" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 half")
    (folder / "empty").mkdir()
    return folder


def told(folder: Path, text: str) -> Compiled:
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    path = Path("recipe.toml")
    return compiled(path, memory_model=FixedMemory(), presets=PRESETS)


def marked(fault: Diagnostic, text: str) -> str:
    """The text under the carets."""
    span = fault.span
    assert span is not None and span.file == "recipe.toml"
    line = text.split("\n")[span.line - 1]
    return line[span.column - 1 : span.end_column - 1 if span.end_line == span.line else None]


def test_the_good_recipe_is_good(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    result = told(world, GOOD)
    assert not result.diagnostics and exit_code(result.diagnostics) == DONE


@pytest.mark.parametrize("row", ROWS, ids=[f"{n:03}-{row[3]}" for n, row in enumerate(ROWS)])
def test_a_broken_recipe_is_one_message(
    row: Row, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, caret, code, words = row
    assert old in GOOD
    text = GOOD.replace(old, new, 1) if old else new + GOOD
    monkeypatch.chdir(world)
    result = told(world, text)
    errors = [fault for fault in result.diagnostics if fault.severity == "error"]
    shown = "\n".join(render(fault, result.texts) for fault in result.diagnostics)
    assert [fault.code for fault in errors] == [code], shown
    assert exit_code(result.diagnostics) == REFUSED and result.plan is None
    assert marked(errors[0], text) == caret, shown
    assert words in " ".join((errors[0].message, errors[0].label, errors[0].help)), shown


def test_several_mistakes_of_all_kinds_are_told_at_once(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing key, a wrong type, a typing error, a missing folder, a conflict, an empty folder:
    none hides another, and none is told twice."""
    text = GOOD
    for old, new in (
        ('name = "try"\n', ""),
        ("lr = 1e-4", 'lr = "fast"'),
        ("rank = 4", "rnk = 4"),
        ('base = "base"', 'base = "bsae"'),
        ('compute = "bf16"', 'compute = "fp16"'),
        ('path = "pictures"', 'path = "empty"'),
    ):
        text = text.replace(old, new, 1)
    monkeypatch.chdir(world)
    assert sorted(fault.code for fault in told(world, text).diagnostics) == [
        "fp16-overflow", "missing-key", "missing-path", "unknown-key", "wrong-type",
    ]  # fmt: skip
    text = text.replace('base = "bsae"', 'base = "base"')
    assert sorted(fault.code for fault in told(world, text).diagnostics) == [
        "fp16-overflow", "missing-key", "no-images", "unknown-key", "wrong-type",
    ]  # fmt: skip
