"""`[publish]`, `[track]` and `[train.guard]`: what becomes of them, what they need, and faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from compiler.machine import HUB_TOKEN
from compiler.plan import Guard, Plan, Publish, alters_trajectory
from compiler.trackers import TRACKERS
from tests.compiler.recipes import MACHINE, compiled, project


def plan_of(path: Path, *overrides: str) -> Plan:
    result = compiled(path, *overrides)
    assert result.plan is not None, result.diagnostics
    return result.plan


def faults(
    path: Path, *overrides: str, missing: tuple[str, ...] = ()
) -> list[tuple[str, str, str]]:
    machine = evolve(MACHINE, missing=missing)
    found = compiled(path, *overrides, machine=machine).diagnostics
    return [(f.severity, f.code, f.path) for f in found]


def test_what_a_plan_says(tmp_path: Path) -> None:
    path = project(tmp_path)
    plan = plan_of(path)
    assert (plan.guard, plan.track, plan.track_project, plan.publish) == (Guard(), (), "", None)
    told = plan_of(
        path,
        "train.guard.skip=3",
        'track.to=["wandb", "tensorboard"]',
        "publish.hub=me/zorps",
        "publish.private=false",
        "publish.webhook=https://hooks.example/x",
    )
    assert told.guard == Guard(skip=3)
    assert (told.track, told.track_project) == (("wandb", "tensorboard"), "tuner")
    assert told.publish == Publish(
        hub="me/zorps", private=False, checkpoints=False, webhook="https://hooks.example/x"
    )
    for key in ("guard.skip", "track", "track_project", "publish.hub"):
        assert not alters_trajectory(key)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_without_its_package(tmp_path: Path, name: str) -> None:
    path, setting = project(tmp_path), f'track.to=["{name}"]'
    assert faults(path, setting) == []
    missing = (TRACKERS[name].package,)
    assert faults(path, setting, missing=missing) == [("warning", "missing-package", "track.to[0]")]


def test_a_missing_token_is_a_warning(tmp_path: Path) -> None:
    path = project(tmp_path)
    found = faults(path, "publish.hub=me/zorps", missing=(HUB_TOKEN,))
    assert found == [("warning", "missing-token", "publish.hub")]
    assert faults(path, "publish.hub=me/zorps") == []
    assert faults(path, missing=(HUB_TOKEN,)) == []


@pytest.mark.parametrize(
    ("setting", "code", "where"),
    [
        ("publish.hub=zorps", "bad-address", "publish.hub"),
        ("publish.hub=a/b/c", "bad-address", "publish.hub"),
        ("publish.hub=me/../x", "bad-address", "publish.hub"),
        ("publish.webhook=hooks.example", "bad-address", "publish.webhook"),
        ("publish.webhook=http://hooks.example/x", "bad-address", "publish.webhook"),
        ("publish.webhook=https://[x", "bad-address", "publish.webhook"),
        ("publish.webhook=file:///etc/passwd", "bad-address", "publish.webhook"),
        ("publish.private=true", "no-effect", "publish.private"),
        ("publish.checkpoints=true", "no-effect", "publish.checkpoints"),
        ("track.project=x", "no-effect", "track.project"),
        ('track.to=["wandb", "wandb"]', "duplicate-id", "track.to[1]"),
        ('track.to=["wandbb"]', "unknown-value", "track.to[0]"),
        ("train.guard.skip=-1", "out-of-range", "train.guard.skip"),
    ],
)
def test_what_is_wrong(tmp_path: Path, setting: str, code: str, where: str) -> None:
    assert faults(project(tmp_path), setting) == [("error", code, where)]


def test_a_webhook_here_needs_no_https(tmp_path: Path) -> None:
    assert faults(project(tmp_path), "publish.webhook=http://127.0.0.1:8000/x") == []
