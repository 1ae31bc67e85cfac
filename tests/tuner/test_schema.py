"""`tuner schema` and `tuner reference`: what is committed is what the classes give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiler.reference import all_rows
from tuner import reference, schema
from tuner.cli import run_command
from tuner.exits import DONE, FAILED

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SHIPPED = sorted([*RECIPES.glob("*.toml"), *RECIPES.glob("presets/*.toml")])


@pytest.mark.parametrize(
    ("path", "text"),
    [(RECIPES / schema.NAME, schema.text), (ROOT / "docs" / "reference.md", reference.text)],
    ids=["schema", "reference"],
)
def test_what_is_committed_is_up_to_date(path: Path, text: object) -> None:
    assert path.read_text(encoding="utf-8") == text(), "run `just generate`"  # type: ignore[operator]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_names_the_schema_on_its_first_line(path: Path) -> None:
    first = path.read_text(encoding="utf-8").split("\n")[0]
    word, place = first.split(" ")
    assert word == "#:schema" and place.startswith(".")
    assert (path.parent / place).resolve() == RECIPES / schema.NAME


def test_the_schema_requires_nothing_but_knows_every_key() -> None:
    found = json.loads(schema.text())
    assert found["$schema"].endswith("draft-07/schema#")
    assert '"required": [' not in schema.text() and '"oneOf"' not in schema.text()
    assert set(found["properties"]) == {row.key for row in all_rows() if "." not in row.key}


def test_the_page_has_every_key_below_its_table() -> None:
    text = reference.text()
    for row in all_rows():
        table, _, name = row.key.removesuffix("[]").rpartition(".")
        if row.table:
            assert f"[{row.key.removesuffix('[]')}]" in text
            continue
        head = f"`[[{table[:-2]}]]`" if table.endswith("[]") else f"`[{table}]`"
        part = text.split(f"\n## {head if table else 'Top level'}\n")[1].split("\n## ")[0]
        assert f"\n| `{name}` |" in part, row.key
    assert text.isascii() and "  \n" not in text and not text.endswith("\n\n")


@pytest.mark.parametrize("verb", ["schema", "reference"])
def test_to_stdout_or_to_a_file(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out"
    assert run_command([verb, "--out", str(path)]) == DONE
    assert capsys.readouterr().out == ""
    assert run_command([verb]) == DONE
    assert capsys.readouterr().out == path.read_text()
    assert run_command([verb, "--out", str(tmp_path)]) == FAILED
    assert "can't be written" in capsys.readouterr().err
