"""`tuner diff A B` of recipes, saved plans and runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attrs import evolve

from compiler.lock import dumps
from tests.compiler.recipes import RECIPE
from tests.tuner.examples import fake_run, quickstart
from tests.tuner.recipe_here import recipe_here
from tuner.cli import run_command
from tuner.exits import DONE, REFUSED


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = recipe_here(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return path


def test_two_recipes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = RECIPE.replace("lr = 1e-4", "lr = 2e-4").replace('name = "try"', 'name = "two"')
    (recipe.parent / "two.toml").write_text(other + "[checkpoints]\nkeep = 9\n")
    assert run_command(["diff", "recipe.toml", "two.toml"]) == DONE
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.split("\n")
    assert lines[0] == "recipe.toml -> two.toml"
    rows = {line[2:].split()[0]: line for line in lines[2:] if line[2:3].isalpha()}
    assert rows["optimizer.lr"].split() == ["!", "optimizer.lr", "0.0001", "->", "0.0002"]
    assert rows["checkpoints.keep"].split() == ["checkpoints.keep", "3", "->", "9"]
    assert rows["name"].split() == ["name", "try", "->", "two"]
    assert lines[-2].startswith("1 of ") and lines[-2].endswith("alter the trained weights (!)")


def test_json_and_the_trajectory(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.parent / "two.toml").write_text(RECIPE.replace("[model]", "seed = 3\n[model]"))
    assert run_command(["diff", "recipe.toml", "two.toml", "--json"]) == DONE
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False and found["same_trajectory"] is False
    by_key = {row["key"]: row for row in found["differences"]}
    assert by_key["seed"] == {"key": "seed", "old": 0, "new": 3, "alters_trajectory": True}
    assert by_key["validation.prompts[beach]"]["new"] is None
    assert by_key["validation.prompts[beach]"]["alters_trajectory"] is False


def test_the_same_twice(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["diff", "recipe.toml", "recipe.toml"]) == DONE
    assert capsys.readouterr().out == "recipe.toml and recipe.toml do the same\n"


def test_a_run_and_a_saved_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path / "run", done=1)
    plan = quickstart()
    saved = tmp_path / "other.lock.toml"
    saved.write_text(dumps(evolve(plan, checkpoints=evolve(plan.checkpoints, keep=5))))
    assert run_command(["diff", str(run), str(saved)]) == DONE
    said = capsys.readouterr().out
    assert "  checkpoints.keep  2 -> 5" in said.split("\n")
    assert said.endswith("1 differ, none of which alters the trained weights\n")


@pytest.mark.parametrize("place", ["nothing.lock.toml", ".", "missing.toml"])
def test_what_is_no_plan(recipe: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["diff", "recipe.toml", place]) == REFUSED
    said = capsys.readouterr()
    assert said.out == "" and "error" in said.err and place in said.err


def test_a_budget_that_differs_is_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.parent / "two.toml").write_text(recipe.read_text() + '[memory]\nbudget = "9 GiB"\n')
    assert run_command(["diff", "recipe.toml", "two.toml"]) == DONE
    assert "  memory.budget  12.0 GiB -> 9 GiB" in capsys.readouterr().out.split("\n")


def test_what_only_one_has_is_said_in_words(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = recipe.with_name("two.toml")
    other.write_text(recipe.read_text() + '[adapter]\nkind = "lora"\n')
    assert run_command(["diff", str(recipe), str(other)]) == DONE
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.split("\n")]
    assert "! adapter only in the second" in rows
    assert run_command(["diff", str(other), str(recipe)]) == DONE
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.split("\n")]
    assert "! adapter only in the first" in rows
