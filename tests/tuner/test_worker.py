"""Processes of one run: their place among each other, and what their ends add up to."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import evolve

from compiler.data.manifest import Manifest
from runtime.errors import MachineUnfit, OutOfMemory, PlanChanged, RunFailed
from runtime.ranks import RanksLost
from tests.tuner.examples import quickstart
from tuner import launch, run, worker
from tuner.exits import REFUSED
from tuner.run import Job
from tuner.worker import BadEnvironment, Seat, failed_file, seat, told

FULL = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}


def test_a_seat_is_what_the_environment_says() -> None:
    assert seat(FULL) == Seat(1, 2)
    assert seat({}) is None
    assert seat({"MASTER_ADDR": "left by another", "RANK": "0"}) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_ADDR": ""}, "but not MASTER_ADDR"),
        ({"RANK": "one"}, "RANK must be a whole number, not `one`"),
        ({"RANK": "2"}, "no rank 2 among 2"),
        ({"LOCAL_RANK": "-1"}, "no rank 1"),
    ],
)
def test_a_wrong_environment_is_refused(
    changes: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(BadEnvironment, match=said):
        seat({**FULL, **changes})
    for name, value in {**FULL, **changes}.items():
        monkeypatch.setenv(name, value)
    assert run.run_recipe(tmp_path / "r.toml", [], accepted=[], strict=False) == REFUSED
    assert said in capsys.readouterr().err


def test_as_many_processes_as_the_plan_has_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(plan=quickstart(), manifest=Manifest([], []), recipe="", seat=Seat(0, 4))
    assert run._run(job, ()) == REFUSED
    said = capsys.readouterr().err
    assert "4 processes were started (WORLD_SIZE), and the plan is for 1" in said
    assert "launch.devices=4" in said


def ended(folder: Path, *codes: int, by_force: tuple[int, ...] = (), stopped: bool = False) -> Any:
    for rank in range(1, len(codes)):
        launch._words_of(folder, rank).write_text("last words")
    plan = evolve(quickstart(), run_folder=str(folder))
    workers: Any = [SimpleNamespace(returncode=code) for code in codes]
    return launch._verdict(plan, folder, workers, set(by_force), stopped=stopped)


@pytest.mark.parametrize(
    "error",
    [
        RunFailed("step 7: loss nan", help="lower the learning rate"),
        OutOfMemory("too much", "less", "train"),
        OutOfMemory("too much", "less", "train", on_host=True),
        MachineUnfit("no cuda here", "`tuner doctor` shows"),
        PlanChanged("another plan", "another name", (("optimizer.lr", "1.0", "2.0"),)),
    ],
)
def test_a_failure_comes_across_as_it_was(error: RunFailed, tmp_path: Path) -> None:
    """Rank 0 says what all of them found; a rank that lost the others is no cause."""
    worker._write(tmp_path / failed_file(0), told(error))
    worker._write(tmp_path / failed_file(1), told(RanksLost("closed")))
    with pytest.raises(type(error)) as caught:
        ended(tmp_path, 1, 1)
    assert type(caught.value) is type(error)
    assert vars(caught.value) == vars(error)


def test_the_cause_is_told_and_who_had_it(tmp_path: Path) -> None:
    worker._write(tmp_path / failed_file(0), told(RanksLost("closed")))
    with pytest.raises(RunFailed, match=r"rank 2 was killed \(SIGKILL\).*(?s:last words)"):
        ended(tmp_path, 1, -9, -9, by_force=(1,))
    worker._write(tmp_path / failed_file(1), told(OutOfMemory("too much", "less", "train")))
    with pytest.raises(OutOfMemory, match="rank 1: too much"):
        ended(tmp_path, 1, 1, -9, by_force=(2,))
    worker._write(tmp_path / failed_file(0), {"kind": "bug", "message": "Traceback"})
    with pytest.raises(launch.WorkerBug, match="Traceback"):
        ended(tmp_path, 70, 1, 1)


def test_who_was_told_to_end_because_another_one_was_killed_has_not_stopped(tmp_path: Path) -> None:
    """Rank 0 filled the cache and took SIGTERM for a wish; with Ctrl-C it would have been one."""
    found = {"status": "stopped", "step": 0, "measured": {}, "result": None}
    worker._write(tmp_path / launch.OUTCOME, found)
    with pytest.raises(RunFailed, match=r"rank 1 was killed \(SIGKILL\)"):
        ended(tmp_path, 130, -9)
    assert ended(tmp_path, 130, 130).status == "stopped"
    assert ended(tmp_path, 130, -9, stopped=True).status == "stopped"


def test_ctrl_c_before_there_is_anything_to_save(tmp_path: Path) -> None:
    outcome = ended(tmp_path, 130, -2, stopped=True)
    assert (outcome.status, outcome.step, outcome.result) == ("stopped", 0, None)
