"""`tuner export` and `tuner sample` as a person calls them, on a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.export.runs import PROMPT
from tuner.cli import run_command
from tuner.exits import DONE, FAILED, REFUSED, UNFIT


def test_export_and_sample_say_where_things_are(runs, tmp_path, capsys):
    folder = runs("sd3").run_folder
    place = tmp_path / "lora.safetensors"
    arguments = ["export", folder, "--format", "kohya", "--precision", "bf16", "--out", str(place)]
    assert run_command(arguments) == DONE
    assert capsys.readouterr().out == f"{place}\n" and place.is_file()
    arguments = ["sample", folder, "--prompt", PROMPT, "--count", "2", "--out", str(tmp_path)]
    assert run_command(arguments) == DONE
    shown = capsys.readouterr().out.splitlines()
    assert shown == [str(tmp_path / f"{PROMPT}-64x64-{seed}.png") for seed in (42, 43)]
    assert all(Path(line).is_file() for line in shown)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", "RUN", "--single-file"], REFUSED, "--merge"),
        (["export", "RUN", "--checkpoint", "3"], REFUSED, "it holds: 2, 4"),
        (["sample", "RUN", "--prompt", "x", "--size", "65x64"], REFUSED, "64x64"),
        (["sample", "RUN", "--prompt", "x", "--device", "xpu"], UNFIT, "xpu"),
        (["sample", "RUN"], REFUSED, "--prompt"),
    ],
)
def test_what_can_t_be_done_is_said(runs, arguments, code, message, capsys):
    folder = runs("sd3").run_folder
    assert run_command([folder if a == "RUN" else a for a in arguments]) == code
    assert message in capsys.readouterr().err


def test_a_base_that_is_gone(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("runtime.export.export.base_folder", lambda *_: tmp_path / "gone")
    out = tmp_path / "merged"
    assert run_command(["export", runs("sd3").run_folder, "--merge", "--out", str(out)]) == FAILED
    assert "gone" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
