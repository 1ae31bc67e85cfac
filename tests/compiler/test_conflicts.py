"""Conflicts and traps of what a run leaves behind, each with its message."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.diagnostics import Diagnostic
from tests.compiler.recipes import RECIPE, FixedMemory, codes, compiled, project

PROMPT = 'validation.prompts={ a = "a dog" }'


def only(folder: Path, *changes: str, family: str = "sana") -> Diagnostic:
    """The one diagnostic of a changed recipe."""
    text = RECIPE.replace('"sana"', f'"{family}"')
    found = compiled(project(folder, text, family), *changes, memory_model=FixedMemory())
    (fault,) = found.diagnostics
    return fault


@pytest.mark.parametrize(
    ("changes", "code", "path", "words"),
    [
        (['checkpoints.every="99 steps"'], "interval-too-long", "checkpoints.every",
         "every 99 steps in a run of 6: no checkpoint is written before the end"),
        ([PROMPT, 'validation.every="50 epochs"'], "interval-too-long", "validation.every",
         "no picture is drawn before the end"),
        (['train.ema={ every = "99 steps" }'], "no-effect", "train.ema.every", "never is"),
        (["validation.steps=4"], "no-effect", "validation.steps", "no validation prompts"),
        (["validation.prompts={}"], "empty-prompt", "validation.prompts", "no prompt here"),
        (['validation.prompts={ a = " " }'], "empty-prompt", "validation.prompts.a", "is empty"),
        ([PROMPT, 'validation.negative="ugly"', "validation.guidance=1"], "no-effect",
         "validation.negative", "only above 1"),
        ([PROMPT, 'validation.sizes=["1024x1024"]'], "unusual-size", "validation.sizes[0]",
         "far from what the base was made for (128 pixels)"),
        ([PROMPT, 'validation.sizes=["640x64"]'], "unusual-size", "validation.sizes[0]",
         "10 times as long as it is wide"),
        ([PROMPT, 'validation.sizes=["66x64"]'], "bad-size", "validation.sizes[0]",
         "edges must be multiples of"),
    ],
)  # fmt: skip
def test_what_is_said(tmp_path: Path, changes: list[str], code: str, path: str, words: str) -> None:
    found = only(tmp_path, *changes)
    assert (found.code, found.path) == (code, path)
    assert words in found.message


def test_a_size_beyond_the_table_of_positions(tmp_path: Path) -> None:
    """SD3 knows 192 places of 16 pixels along an edge."""
    changes = (PROMPT, 'validation.sizes=["3088x64"]')
    found = only(tmp_path, *changes, family="sd3")
    assert found.code == "bad-size" and "positions end at 3072 pixels" in found.message


def test_a_default_interval_is_not_warned_of(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE.replace("epochs = 2", "steps = 1"))
    assert codes(compiled(path, PROMPT)) == []


def test_sizes_near_what_is_trained_are_usual(tmp_path: Path) -> None:
    sizes = 'validation.sizes=["64x64", "96x64", "128x128", "192x128"]'
    assert codes(compiled(project(tmp_path), PROMPT, sizes)) == []


def test_keeping_all_checkpoints_is_said(tmp_path: Path) -> None:
    plan = compiled(project(tmp_path), "checkpoints.keep=0").plan
    assert plan is not None
    assert [d.value for d in plan.decisions if d.key == "checkpoints.keep"] == ["all"]
