"""`result = "best"`: what is said of the result, drawn and written holds of that step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from attrs import evolve
from safetensors import safe_open

from compiler.data.manifest import Manifest
from compiler.keeping import LOSS
from compiler.plan import Checkpoints, Publish
from runtime import checkpoints, resume
from runtime.evaluate import Judge
from runtime.execute import execute
from runtime.export.draw import draw
from runtime.export.export import export
from runtime.export.pictures import pictures
from runtime.export.request import chosen, requested
from runtime.result_step import RESULT, result_step
from runtime.track.base import OFFLINE
from tests.runtime.plans import PICTURES, draw_data, tiny_plan
from tests.runtime.run_plan import Interrupting
from tests.runtime.test_evaluate import NEVER, _evaluation
from tests.runtime.test_publish import Hub

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

STEPS = 6
PICTURE = "dog-64x64-42.png"


def test_all_is_said_of_the_best_step(
    tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published, exported, sampled: the pictures are those that its weights draw."""
    hub = Hub()
    monkeypatch.delenv(OFFLINE, raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    draw_data(tmp_path / "dog", ((64, 64),) * 4)
    plan, whole = tiny_plan(
        "sana",
        tiny_sana,
        tmp_path / "dog",
        tmp_path / "run",
        steps=STEPS,
        lr=0.1,
        checkpoints=Checkpoints(every=2, keep=1, best="evaluation/loss", result="best"),
        validation=evolve(PICTURES, every=0, at_start=False),  # so drawn at the end alone
        publish=Publish(hub="me/zorps", private=True, checkpoints=False, webhook=""),
    )
    samples = list(whole)
    manifest = Manifest(whole.folders, samples, samples[:1])
    plan = evolve(plan, evaluation=_evaluation(manifest), manifest=manifest.digest)
    losses = {0: 3.0, 2: 1.0, 4: 0.5, 6: 0.9}  # what is measured is tested elsewhere

    def judge(self: Judge, *given: Any, **rest: Any) -> None:
        _, _, step, _, trackers, _ = given
        for tracker in trackers:
            tracker.metrics(step, {LOSS: losses[step]})
        self.measured.add(step)

    monkeypatch.setattr(Judge, "judge", judge)
    kept: list[int] = []
    load = resume.load_optimizer

    def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        kept.append(len(optimizer.state))
        load(optimizer, state)

    monkeypatch.setattr(resume, "load_optimizer", load_optimizer)
    outcome = execute(plan, manifest, Interrupting(*NEVER))
    folder = Path(plan.run_folder)
    best = 4
    assert outcome.step == STEPS != best
    assert result_step(folder, plan) == best
    assert kept == [0]  # the last step's state is gone when the best one's comes

    card = hub.files["README.md"].decode()
    assert f"trained for {best} steps" in card
    assert f"| steps | {best}, the best of {STEPS} by evaluation/loss |" in card
    assert hub.messages == [("me/zorps", f"run after {best} steps")]
    weights = chosen(folder, step=best)
    wanted = pictures(weights, [plan.validation.prompts[0].text], out=tmp_path / "again")
    assert [d.seed for d in wanted.drawings] == [42]
    (again,) = draw(weights, wanted)  # by the checkpoint's weights, not the result's
    shown = hub.files[f"samples/{PICTURE}"]
    assert shown == again.read_bytes()
    assert shown != (folder / f"samples/step-{STEPS:06d}" / PICTURE).read_bytes()
    assert {row["step"] for row in _rows(folder) if "loss" in row} == set(range(1, STEPS + 1))

    weights = chosen(folder)
    assert (weights.checkpoint, weights.step) == (None, best)
    file = export(requested(weights))
    assert file.name.startswith(f"run-step-{best:06d}")
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_steps"] == str(best)
    other = chosen(folder, ema=False)  # of the same step: the other weights of the result
    assert other.step == best
    assert other.checkpoint == checkpoints.folder_of(folder / "checkpoints", best)
    drawn = pictures(chosen(folder), ["x"]).drawings[0].path
    assert drawn.parent.name == f"step-{best:06d}"


def _rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_result_whose_step_was_not_noted(tmp_path: Path) -> None:
    """As runs left it that had no best: all of the plan's steps."""
    from tests.tuner.examples import quickstart

    plan = quickstart()
    assert result_step(tmp_path, plan) == plan.steps.total
    for damaged in ("", "{}", "[]", '{"step": null}'):
        (tmp_path / RESULT).write_text(damaged)
        assert result_step(tmp_path, plan) == plan.steps.total
    (tmp_path / RESULT).write_text('{"step": 30}')
    assert result_step(tmp_path, plan) == 30
