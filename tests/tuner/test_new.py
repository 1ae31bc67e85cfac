"""`tuner new`: a recipe that the compiler takes, and that is never written over another file."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from compiler.families import FAMILIES
from tests.compiler.recipes import GPU, compiled, make_pictures
from tuner import new
from tuner.cli import run_command
from tuner.exits import DONE, FAILED, REFUSED
from tuner.new import Answers, recipe_text, schema_line

BASE = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
GIVEN = ["--family", "sana", "--base", BASE, "--data", "dog"]


@pytest.fixture(autouse=True)
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Recipes that were planned, instead of plans: the plan's own tests look at those."""
    found: list[Path] = []

    def show_plan(path: Path, overrides: Sequence[str]) -> int:
        found.append(path)
        return DONE

    monkeypatch.setattr("tuner.plan.show_plan", show_plan)
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "dog", [(1024, 1024)] * 3, caption="a dog")
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_it_writes_compiles(method: str, tmp_path: Path, planned: list[Path]) -> None:
    assert run_command(["new", *GIVEN, "--method", method, "--budget", "20 GiB"]) == DONE
    path = tmp_path / "dog.toml"
    assert planned == [Path("dog.toml")]
    result = compiled(path, "train.batch_size=1", machine=GPU)
    assert result.plan is not None and result.diagnostics == ()
    assert result.plan.name == "dog" and (result.plan.adapter is None) == (method == "full")
    assert result.plan.memory.budget_bytes == 20 * 2**30
    assert all(len(line) <= 100 for line in path.read_text().split("\n"))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family: str, tmp_path: Path, planned: list[Path]) -> None:
    """With the base that is offered; a caption is given, which some can't draw from noise."""
    base = new._example_base(family)
    given = ["--family", family, "--base", base, "--data", "dog", "--caption", "a dog"]
    assert run_command(["new", *given, "--method", "lora", "--budget", "none"]) == DONE
    result = compiled(tmp_path / "dog.toml")
    assert result.plan is not None, result.diagnostics
    assert bool(result.plan.validation.prompts) == (FAMILIES[family].refines == 0)


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    assert run_command(["new", "recipes/mine.toml", *GIVEN, "--name", "mine"]) == DONE
    data = tomllib.loads((tmp_path / "recipes" / "mine.toml").read_text())
    assert data["data"]["source"][0]["path"] == "../dog" and data["model"]["base"] == BASE


def test_a_caption_with_quotes(tmp_path: Path) -> None:
    assert run_command(["new", *GIVEN, "--caption", 'a "sks" \\ dog\n']) == DONE
    data = tomllib.loads((tmp_path / "dog.toml").read_text())
    assert data["data"]["source"][0]["captions"]["prompt"] == 'a "sks" \\ dog\n'
    assert data["validation"]["prompts"] == {"first": 'a "sks" \\ dog\n'}


def test_it_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dog.toml").write_text("mine")
    assert run_command(["new", *GIVEN]) == REFUSED
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "dog.toml").read_text() == "mine"
    assert run_command(["new", "no/such/folder.toml", *GIVEN]) == FAILED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "family, base, data must be given"),
        (["--family", "sana", "--data", "dog"], "base must be given"),
        ([*GIVEN, "--method", "lorra"], "did you mean `lora`?"),
        ([*GIVEN, "--family", "sanna"], "did you mean `sana`?"),
        ([*GIVEN, "--budget", "24"], "24"),
        ([*GIVEN, "--name", "a b"], "can't name a run"),
    ],
)
def test_what_is_refused_writes_nothing(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["new", *arguments]) == REFUSED
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*.toml"))


def test_questions_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    answers = {"Model family": "sd3", "Folder of": "dog", "Method": "full"}

    def prompt(question: str, default: str | None, *, show_default: bool = True) -> str:
        asked.append(question)
        known = [answer for start, answer in answers.items() if question.startswith(start)]
        return (known or [default or ""])[0]

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(new, "_prompt", prompt)
    assert run_command(["new", "--budget", "none"]) == DONE
    assert [question.split()[0] for question in asked] == [
        "Model", "Base:", "Folder", "Method", "Name",
    ]  # fmt: skip
    data = tomllib.loads((tmp_path / "dog.toml").read_text())
    assert data["model"]["base"] == "stabilityai/stable-diffusion-3-medium-diffusers"
    assert "adapter" not in data and data["memory"]["budget"] == "none"


def test_a_folder_without_captions_is_asked_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path / "cat", [(64, 64)])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        new, "_prompt", lambda question, default, **_: "a cat" if "caption" in question else default
    )
    assert run_command(["new", "--family", "sana", "--data", "cat"]) == DONE
    data = tomllib.loads((tmp_path / "cat.toml").read_text())
    assert data["data"]["source"][0]["captions"]["prompt"] == "a cat"


def test_the_schema_is_found_from_where_the_recipe_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = tmp_path / "checkout" / "recipes"
    shelf.mkdir(parents=True)
    monkeypatch.setattr("tuner.shelf.shelf", lambda: shelf)
    assert schema_line(tmp_path) == ""  # nothing there to point at
    (shelf / "recipe.schema.json").write_text("{}")
    assert schema_line(shelf) == "#:schema ./recipe.schema.json"
    assert schema_line(shelf.parent) == "#:schema ./recipes/recipe.schema.json"
    assert schema_line(shelf / "mine") == "#:schema ../recipe.schema.json"
    outside = schema_line(tmp_path).removeprefix("#:schema ")
    assert outside == (shelf / "recipe.schema.json").as_uri()
    answers = Answers(family="sana", base=BASE, data="dog", method="lora", budget="auto", name="x")
    assert recipe_text(answers, shelf / "x.toml").startswith("#:schema ./recipe.schema.json\n# x:")
