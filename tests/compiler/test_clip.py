"""What the plan says of the CLIP score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiler.compile import Compiled
from compiler.passes.clip import NEEDED, OFFLINE
from compiler.plan import alters_trajectory
from tests.compiler.recipes import RECIPE, FixedMemory, codes, compiled, project

SCORED = RECIPE + '\n[validation]\nclip_score = true\nprompts = { dog = "a dog" }\n'
HUB_ID = "openai/clip-vit-base-patch16"


@pytest.fixture(autouse=True)
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OFFLINE, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def _compiled(path: Path, *overrides: str) -> Compiled:
    return compiled(path, *overrides, memory_model=FixedMemory())


def _model(folder: Path, kind: str = "clip") -> Path:
    folder.mkdir()
    for name in NEEDED:
        (folder / name).write_text(json.dumps({"model_type": kind}))
    return folder


def test_the_model_is_in_the_plan(tmp_path: Path) -> None:
    path = project(tmp_path, SCORED)
    plan = _compiled(path).plan
    assert plan is not None and plan.validation.clip_model == HUB_ID
    folder = _model(tmp_path / "clip")
    plan = _compiled(path, "validation.clip_model=clip").plan
    assert plan is not None and plan.validation.clip_model == str(folder)
    plan = _compiled(path, "validation.clip_score=false").plan
    assert plan is not None and plan.validation.clip_model == ""
    assert not alters_trajectory("validation.clip_model")


def test_the_best_checkpoint_may_be_chosen_by_it(tmp_path: Path) -> None:
    best = ("checkpoints.best=evaluation/clip_score", "train.epochs=10")
    plan = _compiled(project(tmp_path, SCORED), *best).plan
    assert plan is not None and plan.checkpoints.best == "evaluation/clip_score"


def test_without_a_network_it_must_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFFLINE, "1")
    path = project(tmp_path, SCORED)
    result = _compiled(path)
    assert codes(result) == ["missing-path"] and "is not on this machine" in _said(result)
    place = tmp_path / "hub" / "models--openai--clip-vit-base-patch16" / "snapshots" / "abc"
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    assert codes(_compiled(path)) == []


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["validation.clip_model=./none"], "missing-path", "there is no folder"),
        (["validation.clip_model=empty"], "unknown-model", "lacks config.json"),
        (["validation.clip_model=other"], "unknown-model", "lacks a config.json of a CLIP model"),
        (["validation.clip_model=x", "validation.clip_score=false"], "no-effect", "no effect"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, overrides: list[str], code: str, words: str) -> None:
    path = project(tmp_path, SCORED)
    (tmp_path / "empty").mkdir()
    _model(tmp_path / "other", "siglip")
    result = _compiled(path, *overrides)
    assert result.plan is None and codes(result) == [code] and words in _said(result)
    assert result.diagnostics[0].help


def test_without_a_picture_there_is_nothing_to_score(tmp_path: Path) -> None:
    recipe = SCORED.replace('prompts = { dog = "a dog" }\n', "")
    result = _compiled(project(tmp_path, recipe))
    assert codes(result) == ["no-effect"] and "no validation prompts" in _said(result)


def _said(result: Compiled) -> str:
    return result.diagnostics[0].message


def test_its_host_memory_is_planned(tmp_path: Path) -> None:
    path = project(tmp_path, SCORED)
    memory = FixedMemory()
    plan = compiled(path, memory_model=memory).plan
    assert plan is not None
    # 149,620,737 parameters, as Transformers builds it, in float32
    assert {asked.clip_bytes for asked in memory.asked} == {4 * 149_620_737}
    said = {decision.key: decision.why for decision in plan.decisions}
    assert said["validation.clip_model"] == "571 MiB of host memory"
    memory = FixedMemory()
    compiled(path, "validation.clip_score=false", memory_model=memory)
    assert {asked.clip_bytes for asked in memory.asked} == {0}
    plan = compiled(path, "validation.clip_model=me/clip", memory_model=FixedMemory()).plan
    assert plan is not None and plan.validation.clip_model == "me/clip"


@pytest.mark.parametrize("config", ["{", "[]", '{"text_config": 3, "vision_config": {"x": null}}'])
def test_a_strange_configuration_has_the_usual_size(tmp_path: Path, config: str) -> None:
    place = tmp_path / "hub" / "models--me--clip" / "snapshots" / "abc"
    place.mkdir(parents=True)
    (place / "config.json").write_text(config)
    assert codes(_compiled(project(tmp_path, SCORED), "validation.clip_model=me/clip")) == []
