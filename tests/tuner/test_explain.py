"""`tuner explain CODE`."""

from __future__ import annotations

import pytest

from compiler.codes import CODES
from tuner.cli import run_command
from tuner.exits import DONE, REFUSED
from tuner.explain import text


def test_one_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain", "batch-too-large"]) == DONE
    assert capsys.readouterr().out == (
        "batch-too-large: a batch larger than the data\n"
        "\n"
        "No source can fill a batch of this size, so the run would not do what the recipe\n"
        "says. Repeats count: 10 images with `repeats = 5` are 50 samples. A small source\n"
        "beside one that fills batches is trained in short ones.\n"
        "\n"
        "wrong:\n"
        "    [train]\n"
        "    batch_size = 500\n"
        "\n"
        "right:\n"
        "    [train]\n"
        "    batch_size = 2\n"
    )


def test_all_codes_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain"]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CODES)
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("code", CODES)
def test_every_entry_fits_a_terminal(code: str) -> None:
    assert all(len(line) <= 80 for line in text(code).split("\n"))


def test_a_code_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["explain", "unknwon-key"]) == REFUSED
    said = capsys.readouterr()
    assert said.out == "" and "did you mean `unknown-key`?" in said.err
    assert run_command(["explain", "error[unknown-key]"]) == DONE


def test_a_key_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """A person who reads of a key asks for it by the name that the message says."""
    assert run_command(["explain", "train.max_grad_norm"]) == DONE
    said = capsys.readouterr().out
    assert said.startswith("train.max_grad_norm\n\nClip gradients") and "default   1" in said
    assert run_command(["explain", "max_grad_norm"]) == DONE
    assert capsys.readouterr().out == said
    assert run_command(["explain", "data.source.repeats"]) == DONE
    assert "Passes over the source" in capsys.readouterr().out
    assert run_command(["explain", "adapter"]) == DONE
    assert "full fine-tune" in capsys.readouterr().out
