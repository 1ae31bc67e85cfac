"""The doctor: a verdict and an exit code from facts, and the shelf of recipes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tuner import doctor, shelf
from tuner.exits import DONE, UNFIT

GIB = 2**30
FACTS: dict[str, Any] = {
    "platform": "Linux",
    "versions": {"python": "3.11.7"} | dict.fromkeys(doctor.NEEDED, "1.0"),
    "machine": {
        "device": "cpu", "device_name": "A processor", "cores": 2, "bf16": False,
        "host_free_bytes": GIB, "host_total_bytes": 2 * GIB,
    },
    "cuda": [],
    "disk": {"folder": "/data", "free_bytes": GIB, "total_bytes": 3 * GIB},
    "torch": {"version": "2.13.0+cpu", "cuda": False},
    "families": ["sana", "sd3"],
    "recipes": ["quickstart.toml"],
    "problems": [],
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
    facts = FACTS | {"versions": {"python": "3.11.7", **versions}}
    monkeypatch.setattr("runtime.machine.facts", lambda folder, deep: dict(facts))
    assert doctor.show_machine(as_json=True) == code
    found = json.loads(capsys.readouterr().out)
    assert found["format_version"] == 1 and found["fit"] is (code == DONE)
    assert found["families"] == ["sana", "sd3"]


def test_shipped_recipes_are_found_in_a_checkout_and_in_a_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "sd35-large-lora.toml" in [path.name for path in shelf.shipped_recipes()]
    (tmp_path / "tuner" / "recipes").mkdir(parents=True)
    (tmp_path / "tuner" / "recipes" / "a.toml").touch()
    monkeypatch.setattr(shelf, "__file__", str(tmp_path / "tuner" / "shelf.py"))
    assert [path.name for path in shelf.shipped_recipes()] == ["a.toml"]
