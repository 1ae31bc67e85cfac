"""The address of a webhook, by which anyone can write there, stands in nothing that is shared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attrs import evolve

from compiler.lock import dumps
from compiler.plan import Decision, Plan, Publish, lock_path
from tests.tuner.examples import fake_run, quickstart
from tuner.crash import report_bug
from tuner.diff import show_difference
from tuner.noting import Noted
from tuner.plan_json import json_object
from tuner.report import write_report
from tuner.report_compare import compare
from tuner.run_data import read_run

ADDRESS = "https://hooks.example/services/s3cret?a=1&b=2"
HOST = "https://hooks.example/..."


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was told to a webhook, as an older version noted it."""
    rules = Publish(hub="", private=True, checkpoints=False, webhook=ADDRESS)
    told = Decision(key="publish.webhook", value=ADDRESS, source="a.toml:3", why="")
    plan = quickstart()
    plan = evolve(plan, publish=rules, decisions=(*plan.decisions, told))
    folder = fake_run(tmp_path / "run", plan, done=3)
    before = "https://hooks.example/before-s3cret"
    (folder / "recipe.toml").write_text(
        f'[publish]\n# webhook = "{before}"\nwebhook = "{ADDRESS}"\n'
    )
    event = {"at": 0, "step": 1, "level": "warning", "text": f"could not tell {ADDRESS}"}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    return folder


def test_a_report_shows_the_host_alone(run: Path) -> None:
    page = write_report(run).read_text()
    assert "s3cret" not in page
    assert page.count(HOST) >= 4  # settings, events, twice the recipe


def test_a_report_without_a_plan_does_neither(run: Path) -> None:
    lock_path(run).write_text("damaged")
    (run / "events.jsonl").unlink()
    assert "s3cret" not in write_report(run).read_text()


def test_differences_show_the_host_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = fake_run(tmp_path / "other", done=2)
    plan = read_run(run).plan
    assert plan is not None and plan.publish is not None
    third = fake_run(tmp_path / "third", _told(plan, "https://other.example/s3cret"), done=2)
    assert compare([run, other, third], tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "s3cret" not in page and "https://other.example/..." in page
    for pair in ((run, other), (other, run), (run, third)):
        for as_json in (False, True):
            assert show_difference(*pair, as_json=as_json) == 0
    told = capsys.readouterr().out
    assert "s3cret" not in told and HOST in told


def _told(plan: Plan, address: str) -> Plan:
    assert plan.publish is not None
    return evolve(plan, publish=evolve(plan.publish, webhook=address))


def test_a_plan_for_programs_and_a_traceback_don_t_show_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = evolve(quickstart(), publish=read_run(run).plan.publish)  # type: ignore[union-attr]
    assert "s3cret" in dumps(plan)  # which has to tell it
    shown = json_object(plan, [])
    assert "s3cret" not in json.dumps(shown) and shown["publish"]["webhook"] == HOST
    report_bug(ValueError("x"), ["run", "--set", f"publish.webhook={ADDRESS}"])
    path = Path(capsys.readouterr().err.split("report it with ")[1].strip())
    assert f"publish.webhook={HOST}" in path.read_text() and "s3cret" not in path.read_text()
    path.unlink()


def test_the_report_is_there_before_what_is_left_is_published(run: Path) -> None:
    """Which may take long, and whoever waits presses Ctrl-C."""

    class Shown:
        def phase(self, name: str, total: int, unit: str) -> None:
            pass

    noted = Noted(Shown(), run)  # type: ignore[arg-type]
    noted.phase("validate", 1, "pictures")
    assert not (run / "report.html").exists()
    noted.phase("publish", 0, "")
    assert "<h1>quickstart</h1>" in (run / "report.html").read_text()
