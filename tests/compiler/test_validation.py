"""What is drawn while training: prompts of the recipe and of files, sizes and seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiler.plan import Plan
from tests.compiler.recipes import RECIPE, codes, compiled, project

TOML = """\
beach = "a dog on a beach"
[new]
snow = "ein Hund im Schnee, \\u00e4lter"
moon = "a dog on the moon"
"""
PROMPTS = [
    ("beach", "a dog on a beach", ""),
    ("snow", "ein Hund im Schnee, \u00e4lter", "new"),
    ("moon", "a dog on the moon", "new"),
]
INLINE = f"\n[validation.prompts]\n{TOML.replace('[new]', '[validation.prompts.new]')}"


def planned(path: Path, *settings: str) -> Plan:
    result = compiled(path, *settings)
    assert result.plan is not None, result.diagnostics
    return result.plan


def told(plan: Plan) -> list[tuple[str, str, str]]:
    return [(prompt.name, prompt.text, prompt.group) for prompt in plan.validation.prompts]


def test_prompts_of_files_are_those_of_the_recipe(tmp_path: Path) -> None:
    inline = planned(project(tmp_path / "inline", RECIPE + INLINE))
    assert told(inline) == PROMPTS
    path = project(tmp_path / "file", f'{RECIPE}\n[validation]\nprompts = "words/p.toml"\n')
    (path.parent / "words").mkdir()
    (path.parent / "words/p.toml").write_text(TOML, encoding="utf-8")
    table = {"beach": PROMPTS[0][1], "new": {name: text for name, text, _ in PROMPTS[1:]}}
    (path.parent / "words/p.json").write_text("\ufeff" + json.dumps(table), encoding="utf-8")
    assert told(planned(path)) == told(planned(path, "validation.prompts=words/p.json")) == PROMPTS


@pytest.mark.parametrize("text", ["[1, 2]", '{"a": 3}', '{"a": ["x"]}', '{"a"', '{"a b/c": "x"}'])
def test_files_that_hold_no_prompts_are_refused(tmp_path: Path, text: str) -> None:
    path = project(tmp_path, f'{RECIPE}\n[validation]\nprompts = "p.json"\n')
    (tmp_path / "p.json").write_text(text)
    result = compiled(path)
    assert result.plan is None and codes(result)[0] in ("bad-prompts", "wrong-type", "bad-name")
    assert result.diagnostics[0].path == "validation.prompts"


def test_each_size_and_seed(tmp_path: Path) -> None:
    more = '\n[validation]\nprompts = { a = "a dog" }\nsizes = ["64x64", "128x64"]\n'
    more += 'seed = 7\ncount = 3\nnegative = "ugly"\nguidance = 2.5\nscheduler = "dpm++"\n'
    drawn = planned(project(tmp_path, RECIPE + more)).validation
    assert drawn.sizes == ((64, 64), (128, 64)) and drawn.seeds == (7, 8, 9)
    assert (drawn.negative, drawn.guidance, drawn.scheduler) == ("ugly", 2.5, "dpm++")
