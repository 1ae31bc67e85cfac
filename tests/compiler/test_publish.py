"""`[publish]`, `[track]` and `[train.guard]`: what becomes of them, what they need, and faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from compiler.costs import kept
from compiler.keeping import WAITING
from compiler.machine import HUB_TOKEN
from compiler.plan import Guard, Plan, Publish, alters_trajectory
from compiler.secrets import without_webhook
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


@pytest.mark.parametrize(
    "address",
    [
        "https://hooks.example/s3cret a",
        "https://hooks.example/s3cret\\n",
        "https://hooks.example/s3cr\u00e9t",
        "https://hooks.example:99999/s3cret",
        "https://hooks.example:0/s3cret",
        "https://hooks.example:x/s3cret",
        "https://me:s3cret@hooks.example/",
        "http://hooks.example/s3cret",
        "https:///s3cret",
    ],
)
def test_an_address_that_could_not_be_told_is_refused_and_not_shown(
    tmp_path: Path, address: str
) -> None:
    result = compiled(project(tmp_path), f'publish.webhook="{address}"')
    (fault,) = result.diagnostics
    assert (fault.code, fault.path) == ("bad-address", "publish.webhook")
    assert "s3cr" not in fault.message + fault.help


@pytest.mark.parametrize(
    "address", ["https://hooks.example:8443/x%20y?z=1#a", "https://[::1]/x", "https://h"]
)
def test_an_address_that_can(tmp_path: Path, address: str) -> None:
    assert faults(project(tmp_path), f'publish.webhook="{address}"') == []


def test_decisions_do_not_tell_the_address(tmp_path: Path) -> None:
    """They stand in reports, which are shared; the plan itself has it, to tell it."""
    plan = plan_of(project(tmp_path), "publish.webhook=https://hooks.example/s3cret")
    (made,) = (one for one in plan.decisions if one.key == "publish.webhook")
    assert (made.value, made.source) == ("https://hooks.example/...", "--set")
    assert plan.publish is not None and plan.publish.webhook == "https://hooks.example/s3cret"
    assert not any("s3cret" in one.value + one.why for one in plan.decisions)


@pytest.mark.parametrize(
    ("stated", "shown"),
    [
        ('webhook = "https://h.x/s3cret" # why', 'webhook = "https://h.x/..." # why'),
        ("  # webhook='https://h.x/s3cret'", "  # webhook='https://h.x/...'"),
        ('{ webhook = "https://h.x/s3cret", hub = 1 }', '{ webhook = "https://h.x/...", hub = 1 }'),
        ('"webhook" = """\nhttps://h.x/s3cret"""', '"webhook" = "https://h.x/..."'),
        ("--set publish.webhook=https://h.x/s3cret -q", "--set publish.webhook=https://h.x/... -q"),
        ('webhook = "https://[s3cret"', 'webhook = "..."'),
        ('webhook =\nhub = "a/b"', 'webhook =\nhub = "a/b"'),
        ('webhook = ""\nmy_webhook_1 = 3', 'webhook = ""\nmy_webhook_1 = 3'),
    ],
)
def test_a_text_without_its_webhook(stated: str, shown: str) -> None:
    assert without_webhook(stated) == shown


def test_an_address_that_stands_elsewhere() -> None:
    text = "it was told to https://h.x/s3cret, twice"
    assert without_webhook(text, "https://h.x/s3cret") == "it was told to https://h.x/..., twice"


def test_what_waits_for_the_hub_takes_room(tmp_path: Path) -> None:
    given = ("train.epochs=40", "checkpoints.every=10 steps", "checkpoints.keep=2")
    path = project(tmp_path)
    rooms = [
        kept(plan_of(path, *given, f"publish.checkpoints={value}", "publish.hub=a/b"))
        for value in ("false", "true")
    ]
    assert rooms == [3, 3 + WAITING]
