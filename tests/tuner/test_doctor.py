"""The doctor: a verdict and an exit code from facts, and the shelf of recipes."""

import json
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from compiler.compile import Compiled, compile_file
from compiler.families import FAMILIES
from runtime import checkup
from tests.compiler.recipes import GPU as GPU_MACHINE
from tests.compiler.recipes import RECIPE, FixedMemory, project
from tuner import doctor, doctor_recipes, shelf
from tuner.exits import DONE, REFUSED, UNFIT

GIB = 2**30
MPS = '\n[launch]\ndevice = "mps"\n'
FACTS: dict[str, Any] = {
    "platform": "Linux",
    "versions": {"python": "3.11.7"} | dict.fromkeys(doctor.NEEDED, "1.0"),
    "machine": {
        "device": "cpu", "device_name": "A processor", "cores": 2, "bf16": False,
        "host_free_bytes": GIB, "host_total_bytes": 2 * GIB,
    },
    "cuda": [],
    "allocator": "",
    "disk": {"folder": "/data", "free_bytes": GIB, "total_bytes": 3 * GIB},
    "torch": {"version": "2.13.0+cpu", "cuda": False},
    "families": ["sana", "sd3"],
    "recipes": ["quickstart.toml"],
    "problems": [],
    "notes": [],
    "features": {},
    "distributed": {"nccl": False, "gloo": True},
    "compiler": "/usr/bin/c++",
    "extras": {"tensorboard": "2.21", "triton": ""},
    "open_files": 1024,
    "hub": {"token": False},
}  # fmt: skip
GPU = {"name": "A card", "total_bytes": 24 * GIB, "free_bytes": 23 * GIB, "capability": "8.9",
       "driver": "570"}  # fmt: skip


def test_a_fit_machine_has_no_problems() -> None:
    assert doctor.problems(FACTS) == []
    said = doctor.text(FACTS)
    assert "disk      1.0 GiB free of 3.0 GiB at /data" in said
    assert said.endswith("verdict   fit to train")
    assert all(len(line) <= 80 for line in said.split("\n"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"python": "3.11.7"}}, "torch is not installed"),
        ({"torch": {"error": "torch can't be imported: no libgomp"}}, "no libgomp"),
        ({"cuda": [GPU]}, "A card is there, but the installed torch 2.13.0+cpu can't use it"),
    ],
)
def test_each_problem_is_a_sentence(change: dict[str, Any], words: str) -> None:
    assert any(words in problem for problem in doctor.problems(FACTS | change))


@pytest.mark.parametrize(("versions", "code"), [(FACTS["versions"], DONE), ({}, UNFIT)])
def test_the_exit_code_tells(
    versions: dict[str, str], code: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    facts = FACTS | {"versions": {"python": "3.11.7", **versions}, "disk": dict(FACTS["disk"])}
    facts["machine"] = FACTS["machine"] | {"capability": ""}
    monkeypatch.setattr("runtime.machine.facts", lambda folder, deep: dict(facts))
    monkeypatch.setattr("runtime.checkup.disk_speed", lambda folder: {"error": "not tried"})
    monkeypatch.setattr(doctor, "shipped_recipes", list)
    assert doctor.show_machine(as_json=True) == code
    found = json.loads(capsys.readouterr().out)
    assert found["format_version"] == 1 and found["fit"] is (code == DONE)
    assert found["families"] == sorted(FAMILIES)
    assert "hub" in found and "problem" not in found["hub"]  # nobody asked the network
    assert any("not tried" in note for note in found["notes"])


def test_shipped_recipes_are_found_in_a_checkout_and_in_a_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "sd35-large-lora.toml" in [path.name for path in shelf.shipped_recipes()]
    (tmp_path / "tuner" / "recipes").mkdir(parents=True)
    (tmp_path / "tuner" / "recipes" / "a.toml").touch()
    monkeypatch.setattr(shelf, "__file__", str(tmp_path / "tuner" / "shelf.py"))
    assert [path.name for path in shelf.shipped_recipes()] == ["a.toml"]


def test_windows_silent_spill_is_named() -> None:
    there = FACTS | {"cuda": [GPU]}
    assert doctor.SPILL in doctor.notes(there, [], spills=True)
    assert doctor.notes(there, [], spills=False) == doctor.notes(FACTS, [], spills=True) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"compiler": ""}, "no C++ compiler"),
        ({"open_files": 256}, "only 256 files"),
        ({"disk": {"error": "Read-only file system"}}, "Read-only file system"),
        ({"hub": {"token": True, "problem": "does not answer: timed out"}}, "timed out"),
    ],
)
def test_what_is_worth_knowing_is_noted(change: dict[str, Any], words: str) -> None:
    (note,) = doctor.notes(FACTS | change, [], spills=False)
    assert words in note


def test_a_gpu_and_its_abilities_are_shown() -> None:
    there = FACTS | {"cuda": [GPU], "features": checkup.features("8.6")}
    said = doctor.text(there)
    assert "offers    bf16, flash attention, no fp8" in said
    assert "no token is set; not asked" in said and "lacking   triton (optional)" in said
    assert checkup.features("8.9")["fp8"] and not any(checkup.features("7.5").values())
    assert checkup.features("") == checkup.features("[N/A]") == {}


def test_bad_versions_are_told_by_what_they_do() -> None:
    good = {"typer": "0.28.1", "torch": "2.13.0+cu130", "diffusers": "0.42.1", "peft": "0.21.2",
            "transformers": "5.23.0", "accelerate": "1.15.0", "torchao": "0.18.0"}  # fmt: skip
    assert checkup.bad_versions(good) == []
    (line,) = checkup.bad_versions(good | {"typer": "0.29.2"})
    assert line.startswith("typer 0.29.2 imports pydantic")
    assert len(checkup.bad_versions(good | {"torch": "2.14.1+cpu", "peft": "0.9"})) == 2
    assert checkup.bad_versions(good | {"torch": "a-build-of-mine"}) == []


def test_the_disk_is_tried_and_nothing_stays(tmp_path: Path) -> None:
    found = checkup.disk_speed(tmp_path / "not" / "there", 2**20)
    assert found["write_bytes_per_second"] > 0 and found["read_bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == []
    assert "error" in checkup.disk_speed(Path("/proc"), 2**20)


def test_a_hub_that_is_away_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer" in checkup.hub_answers(1.0)
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    assert "does not answer" in checkup.hub_answers(1.0)


@pytest.fixture
def tiny_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compilations on a made-up card, with memory by formula."""

    def compile_here(path: Path, options: list[str], *, simulate: bool = True) -> Compiled:
        model = FixedMemory() if simulate else None
        cache = tmp_path / "cache"
        return compile_file(path, overrides=options, machine=GPU_MACHINE, memory_model=model,
                            cache_default=cache)  # fmt: skip

    monkeypatch.setattr(doctor_recipes, "compile_here", compile_here)


@pytest.mark.usefixtures("tiny_compiler")
def test_a_recipe_is_judged_by_what_is_free_not_by_its_budget(tmp_path: Path) -> None:
    budget = '\n[memory]\nbudget = "1 GiB"\n[launch]\ndevice = "cuda"\n'
    path = project(tmp_path, RECIPE + budget)
    found = doctor_recipes.judge(path, "cuda")
    assert found.fits and found.peak_bytes == 8 * GIB
    assert found.words == "needs 8.0 GiB of 23.0 GiB free"


@pytest.mark.usefixtures("tiny_compiler")
def test_a_recipe_for_another_device_says_what_it_needs(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + '\n[memory]\nbudget = "5 GiB"\n[launch]\ndevice = "mps"\n')
    found = doctor_recipes.judge(path, "cuda")
    assert found.fits is False and found.peak_bytes == 5 * GIB
    assert found.words == "needs 5.0 GiB on a mps device; there is none here"


def test_a_recipe_whose_optimizer_is_not_installed_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = evolve(GPU_MACHINE, missing=("bitsandbytes",))
    monkeypatch.setattr(
        doctor_recipes,
        "compile_here",
        lambda path, options, simulate=True: compile_file(
            path,
            overrides=["train.optimizer.name=bnb-adamw-8bit"],
            machine=machine,
            memory_model=FixedMemory(),
            cache_default=tmp_path / "cache",
        ),
    )
    found = doctor_recipes.judge(project(tmp_path), "cuda")
    assert found.fits is False and "pip install bitsandbytes" in found.words


@pytest.mark.usefixtures("tiny_compiler")
def test_missing_pictures_are_made_up_for_the_judgement(tmp_path: Path) -> None:
    path = project(tmp_path)
    text = (
        path.read_text()
        .replace('"pictures"', '"mine/photos"')
        .replace('"base"', f'"{tmp_path / "base"}"')
    )
    path.write_text(text)
    before = sorted(tmp_path.iterdir())
    assert doctor_recipes.judge(path, "cuda").fits is True
    assert sorted(tmp_path.iterdir()) == before
    path.write_text(text + "rnk = 1\n")
    found = doctor_recipes.judge(path, "cuda")
    assert found.fits is None and "rnk" in found.words


@pytest.mark.usefixtures("tiny_compiler")
def test_recipes_are_judged_until_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project(tmp_path)
    assert [row.fits for row in doctor_recipes.judge_all([path], "cuda")] == [True]
    monkeypatch.setattr(doctor_recipes, "SECONDS", -1.0)
    (row,) = doctor_recipes.judge_all([path], "cuda")
    assert row.fits is None and "run it again" in row.words


@pytest.mark.usefixtures("tiny_compiler")
@pytest.mark.parametrize(
    ("recipe", "code"),
    [(RECIPE, DONE), (RECIPE + "rnk = 1\n", REFUSED), (RECIPE + MPS, UNFIT)],
)
def test_one_recipe_and_its_exit_code(
    recipe: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("tuner.compiling.compile_here", doctor_recipes.compile_here)
    there = FACTS | {"fit": True, "machine": FACTS["machine"] | {"device": "cuda"}}
    monkeypatch.setattr(doctor, "examined", lambda online: there)
    assert doctor.show_machine(recipe=project(tmp_path, recipe), as_json=True) == code
    found = json.loads(capsys.readouterr().out)
    assert found["fit"] is (code == DONE) and found["fits"][0]["recipe"] == "recipe.toml"
