"""`tuner plan --explain KEY`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tuner.recipe_here import recipe_here
from tuner.cli import run_command
from tuner.exits import DONE, REFUSED


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = recipe_here(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return path.name


def _said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_command(["plan", *arguments]) == DONE
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def test_a_value_that_the_base_gave(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys, recipe, "--explain", "train.timesteps.shift")
    assert said.startswith(
        "train.timesteps.shift\n"
        "\n"
        "value     3\n"
        "from      the base's scheduler, its configuration says flow_shift\n"
        "\n"
        "sigma = shift s / (1 + (shift - 1) s)"
    )
    assert "\n\ntakes     a number" in said and said.endswith('default   "auto"\n')


@pytest.mark.parametrize(
    ("key", "value", "origin"),
    [
        ("train.epochs", "2", "recipe.toml:15"),
        ("seed", "9", "override (--set)"),
        ("train.loss.kind", "mse", "default"),
        ("shift", "3", "the base's scheduler, its configuration says flow_shift"),
        ("precision.compute", "float32", "decided by pass precision, because processors"),
        ("data.source.0.path", "pictures", "recipe.toml:11"),
        ("data.source[0].resolution", "64", "inherited, as data.resolution"),
    ],
)
def test_who_gave_it(
    recipe: str, key: str, value: str, origin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = _said(capsys, recipe, "--set", "seed=9", "--explain", key).split("\n")
    assert lines[2] == f"value     {value}"
    assert lines[3].startswith(f"from      {origin}")


def test_a_table_lists_its_keys(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = _said(capsys, recipe, "--explain", "train.optimizer")
    row = "  train.optimizer.lr                      0.0001      recipe.toml:17"
    assert row in text.split("\n")
    assert "leaves its table out" in _said(capsys, recipe, "--explain", "adapter.rank")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.timesteps.shfit", "did you mean `train.timesteps.shift`?"),
        ("shfit", "did you mean `train.timesteps.shift`?"),
        ("learning_rate", "did you mean `train.optimizer.lr`?"),
        ("every", "may be `checkpoints.every`, `validation.every`"),
        ("zzz.qqq", "lists all keys"),
    ],
)
def test_a_key_that_is_none(
    recipe: str, key: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["plan", recipe, "--explain", key]) == REFUSED
    said = capsys.readouterr()
    assert said.out == "" and words in said.err


def test_json(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(_said(capsys, recipe, "--explain", "train.accumulate", "--json"))
    assert found["decisions"] == [
        {"key": "train.accumulate", "value": "1", "source": "default", "why": ""}
    ]
    assert (found["type"], found["range"], found["default"]) == (
        "a whole number",
        "1 to 65536",
        "1",
    )


def test_a_wrong_recipe_is_told_first(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command(["plan", recipe, "--set", "train.batch_size=99", "--explain", "seed"])
    assert code == REFUSED and "batch-too-large" in capsys.readouterr().err


WRONG = ("--set", "train.optimizer.lr=-1", "--set", "data.resolution=9000")


def test_what_is_known_in_spite_of_errors(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", recipe, *WRONG, "--explain", "shift"]) == REFUSED
    said = capsys.readouterr()
    assert said.out.startswith("train.timesteps.shift\n\nvalue     3\nfrom      the base's")
    assert said.err.count("error[out-of-range]") == 2
    assert "recipe.toml: 2 errors" in said.err


@pytest.mark.parametrize("key", ["train.optimizer.lr", "data.resolution", "data.multiple"])
def test_what_errors_leave_open_is_not_made_up(
    recipe: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["plan", recipe, *WRONG, "--explain", key]) == REFUSED
    said = capsys.readouterr().out
    assert f"{key}\n\nvalue     not known, because the recipe has errors\n" in said
    assert "takes     " in said


def test_a_recipe_that_is_no_toml_still_explains_keys(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(recipe).write_text("name = my run\n")
    assert run_command(["plan", recipe, "--explain", "train.epochs"]) == REFUSED
    said = capsys.readouterr()
    assert "value     not known" in said.out and "Passes over the data." in said.out
    assert "error[invalid-toml]" in said.err


def test_a_wrong_key_has_a_nearest_name_also_beside_errors(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["plan", recipe, *WRONG, "--explain", "train.epohcs"]) == REFUSED
    said = capsys.readouterr()
    assert said.out == ""
    assert "error: the recipe has no key `train.epohcs`\nhelp: did you mean `train.epochs`?" in (
        said.err
    )
