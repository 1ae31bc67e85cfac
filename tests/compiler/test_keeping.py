"""Which checkpoints stay: the rule, the count of what lies there at once, and the plan's words."""

from __future__ import annotations

import random
from math import inf, nan
from pathlib import Path

import pytest

from compiler.compile import Compiled
from compiler.keeping import at_once, best_of, doomed, proven
from compiler.occasions import Occasions
from compiler.plan import Checkpoints
from tests.compiler.recipes import RECIPE, FixedMemory, codes, compiled, project
from tuner.plan_view import text

HOLDOUT = RECIPE.replace('path = "pictures"', 'path = "pictures"\nholdout = 2').replace(
    "epochs = 2", "epochs = 10"
)


def _compiled(path: Path, *overrides: str) -> Compiled:
    return compiled(path, *overrides, memory_model=FixedMemory())


def test_the_newest_multiples_and_the_best_stay() -> None:
    steps = [10, 20, 30, 40, 50, 60]
    assert doomed(steps, Checkpoints(every=10, keep=0), None) == []
    assert doomed(steps, Checkpoints(every=10, keep=2), None) == [10, 20, 30, 40]
    assert doomed(steps, Checkpoints(every=10, keep=2, keep_every=20), None) == [10, 30]
    assert doomed(steps, Checkpoints(every=10, keep=2, keep_every=40), 30) == [10, 20]
    assert doomed([10], Checkpoints(every=10, keep=5), None) == []


def test_the_newest_that_a_later_step_was_good_with() -> None:
    """Weights of step 2 made steps 3 and 4 bad: they are in the checkpoints of 2, 3 and 4."""
    assert proven([1, 2, 3, 4], {3, 4}, 4) == 1
    assert proven([1, 2, 3, 4], set(), 4) == 3
    assert proven([1, 2, 3, 4], {2, 3}, 4) == 3  # step 4 was good with what they left alone
    assert proven([2, 4], {3, 4}, 4) is None and proven([4], set(), 4) is None
    assert proven([], {1}, 1) is None and proven([1], {1, 0}, 1) is None
    rules = Checkpoints(every=1, keep=1)
    assert doomed([1, 2, 3, 4], rules, None, 1) == [2, 3]


def test_the_best_by_a_metric() -> None:
    rows = [
        {"step": 0, "evaluation/loss": 0.1},
        {"step": 2, "evaluation/loss": 0.5, "evaluation/clip_score": 20.0},
        {"step": 4, "evaluation/loss": 0.3, "evaluation/clip_score": 25.0},
        {"step": 6, "evaluation/loss": 0.3, "evaluation/clip_score": 24.0},
        {"step": 7, "loss": 0.0},
    ]
    assert best_of(rows, "evaluation/loss", [2, 4, 6, 7]) == 4  # of equals the first; 0 is none
    assert best_of(rows, "evaluation/loss", [2, 6]) == 6
    assert best_of(rows, "evaluation/clip_score", [2, 4, 6]) == 4  # the highest
    assert best_of(rows, "evaluation/loss", [7]) is None
    for bad in (nan, inf, -inf):
        rows[2]["evaluation/loss"] = bad
        assert best_of(rows, "evaluation/loss", [2, 4, 6]) == 6
        assert best_of(rows, "evaluation/loss", [4]) is None


def test_as_many_lie_there_as_a_run_keeps() -> None:
    """Against the rule itself, step by step."""
    chance = random.Random(3)
    for _ in range(300):
        total = chance.randint(1, 60)
        rules = Checkpoints(
            every=chance.randint(0, 12),
            keep=chance.randint(0, 6),
            keep_every=chance.choice((0, 1, 2, 3, 4, 6, 8, 25)),
        )
        there: list[int] = []
        most = 0
        for step in Occasions(rules.every, total):
            there.append(step)
            most = max(most, len(there))
            gone = doomed(there, rules, None)
            there = [each for each in there if each not in gone]
        assert at_once(rules, total) == most, (rules, total)
    best = Checkpoints(every=1, keep=2, best="evaluation/loss")
    assert at_once(best, 9) == 4 and at_once(best, 3) == 3


def test_in_the_plan(tmp_path: Path) -> None:
    rules = ('checkpoints.keep_every="4 steps"', "checkpoints.best=evaluation/loss")
    path = project(tmp_path, HOLDOUT)
    result = _compiled(path, *rules, "checkpoints.result=best", "checkpoints.keep=2")
    assert codes(result) == [] and result.plan is not None
    assert result.plan.checkpoints == Checkpoints(
        every=2, keep=2, keep_every=4, best="evaluation/loss", result="best"
    )
    words = " ".join(text(result.plan, recipe="r.toml").split())
    assert (
        "every 2 steps, the newest 2, each 4th step's and the best by evaluation/loss stay; the "
        "result is the best" in words
    )


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (['checkpoints.keep_every="4 steps"', "checkpoints.keep=0"], "no-effect", "keeps all"),
        (['checkpoints.keep_every="11 steps"'], "no-effect", "no checkpoint of this run"),
        (['checkpoints.keep_every="4 steps"', "checkpoints.every=off"], "no-effect", "at the end"),
        (["checkpoints.result=best"], "no-effect", "no metric says"),
        (["checkpoints.best=losses"], "unknown-value", "unknown metric `losses`"),
        (["checkpoints.best=evaluation/loss", "evaluation.every=off"], "no-effect", "not measured"),
        (["checkpoints.best=evaluation/loss/cats"], "no-effect", "not measured"),
        (["checkpoints.best=evaluation/clip_score"], "no-effect", "not measured"),
        (
            ["checkpoints.best=evaluation/loss", 'checkpoints.every="11 steps"'],
            "no-effect",
            "no checkpoint but the last",
        ),
    ],
)
def test_what_means_nothing_is_refused(
    tmp_path: Path, overrides: list[str], code: str, words: str
) -> None:
    result = _compiled(project(tmp_path, HOLDOUT), *overrides)
    assert result.plan is None and codes(result) == [code]
    assert words in result.diagnostics[0].message
    assert result.diagnostics[0].help
