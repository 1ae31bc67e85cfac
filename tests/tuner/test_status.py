"""`tuner status`: each state that a run can be in, from its folder alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf, nan
from pathlib import Path

import pytest
from attrs import evolve

from compiler import lock
from compiler.plan import lock_path
from tests.tuner.examples import quickstart
from tuner.curve import sparkline
from tuner.exits import DONE, REFUSED
from tuner.noting import NOTE, Noted
from tuner.progress import progress
from tuner.run_data import read_run
from tuner.status import Status, show_status, status

fcntl = pytest.importorskip("fcntl")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 200 steps that has not begun."""
    plan = quickstart()
    plan = evolve(plan, run_folder=str(tmp_path), steps=evolve(plan.steps, total=200, epochs=4))
    lock_path(tmp_path).write_text(lock.dumps(plan))
    return tmp_path


@contextmanager
def held(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("a+b") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def trained(folder: Path, steps: int) -> None:
    rows = [
        {"step": n, "epoch": 2, "loss": 1 / n, "grad_norm": 0.5, "lr": 1e-4, "seconds": 2.0}
        for n in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def saved(folder: Path, step: int) -> None:
    place = folder / "checkpoints" / f"step-{step:06d}"
    place.mkdir(parents=True)
    (place / "state.json").write_text(json.dumps({"step": step, "files": {}}))


def told(folder: Path) -> Status:
    data = read_run(folder)
    assert data.plan is not None
    return status(data, data.plan)


def test_one_that_has_not_begun(run: Path) -> None:
    found = told(run)
    assert (found.state, found.step, found.steps, found.loss) == ("waiting", 0, 200, None)
    assert found.seconds_left is None and found.result is None


def test_a_running_one(run: Path) -> None:
    trained(run, 50)
    saved(run, 40)
    note = {"phase": "train", "done": 0, "total": 200, "unit": "steps", "pid": os.getpid()}
    (run / NOTE).write_text(json.dumps(note))
    with held(run):
        found = told(run)
    assert (found.state, found.phase, found.phase_done, found.phase_total) == (
        "running",
        "train",
        50,
        200,
    )
    assert (found.step, found.epoch, found.checkpoint, found.pid) == (50, 2, 40, os.getpid())
    assert found.loss == pytest.approx(0.02)
    assert found.loss_recent == pytest.approx(sum(1 / n for n in range(1, 51)) / 50)
    assert found.seconds_per_step == pytest.approx(2.0)
    assert found.seconds_left == pytest.approx(300.0)
    if sys.platform == "linux":
        assert found.process_bytes is not None and found.process_bytes > 2**20


def test_one_that_caches(run: Path) -> None:
    note = {"phase": "latents", "done": 12, "total": 48, "unit": "pictures", "pid": 1}
    (run / NOTE).write_text(json.dumps(note))
    with held(run):
        found = told(run)
    assert (found.phase, found.phase_done, found.phase_total) == ("latents", 12, 48)


def test_stopped_killed_and_finished(run: Path) -> None:
    trained(run, 50)
    assert told(run).state == "stopped"
    (run / NOTE).write_text(json.dumps({"phase": "save", "done": 0, "total": 0, "pid": 1}))
    killed = told(run)
    assert (killed.state, killed.phase, killed.pid) == ("killed", "save", None)
    assert killed.seconds_left is None
    (run / NOTE).unlink()
    trained(run, 200)
    memory = {"train": {"measured_bytes": 5 * 2**20}, "save": {"measured_bytes": None}}
    (run / "measured.json").write_text(json.dumps({"memory": memory}))
    (run / ("lora" if quickstart().adapter else "model")).mkdir()
    done = told(run)
    assert (done.state, done.step, done.measured_bytes) == ("finished", 200, 5 * 2**20)
    assert done.result is not None


def test_the_words(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(run, 50)
    with held(run):
        assert show_status(run, as_json=False) == DONE
    text = capsys.readouterr().out
    assert "running" in text and "50 of 200 steps, epoch 2 of 4" in text
    assert "about 5 min" in text and "2.0 s/step, learning rate 1.0e-04" in text
    assert show_status(run, as_json=True) == DONE
    answer = json.loads(capsys.readouterr().out)
    assert (answer["format_version"], answer["state"], answer["step"]) == (1, "stopped", 50)


@pytest.mark.parametrize("damage", ["no folder", "no plan"])
def test_refusals(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" if damage == "no folder" else tmp_path
    assert show_status(folder, as_json=False) == REFUSED
    assert "help:" in capsys.readouterr().err


def test_damaged_notes_and_metrics_are_no_end_of_it(run: Path) -> None:
    (run / NOTE).write_text('["phase"')
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": "low"}\n{"st')
    found = told(run)
    assert (found.step, found.loss, found.state) == (3, None, "stopped")


def test_notes_are_rare_and_gone_at_the_end(run: Path) -> None:
    now = [100.0]
    with Path(os.devnull).open("w") as nowhere:
        events = Noted(progress(quickstart(), nowhere), run, clock=lambda: now[0])
        events.phase("latents", 10, "pictures")
        events.advance(1)
        assert json.loads((run / NOTE).read_text())["done"] == 0
        now[0] = 103.0
        events.advance(2)
        note = json.loads((run / NOTE).read_text())
        assert (note["phase"], note["done"], note["since"], note["seen"]) == (
            "latents",
            2,
            100.0,
            103.0,
        )
        events.close()
        assert not (run / NOTE).exists()
        other = Noted(progress(quickstart(), nowhere), run)  # refused: the folder is another's
        (run / NOTE).touch()
        other.close()
    assert (run / NOTE).exists()


def test_a_note_that_a_full_disk_has_no_room_for_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *arguments: object, **named: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    with Path(os.devnull).open("w") as nowhere:
        events = Noted(progress(quickstart(), nowhere), run)
        monkeypatch.setattr(Path, "write_text", full)
        events.phase("latents", 10, "pictures")
        events.close()
    assert not list(run.glob("*phase.json"))


def test_no_torch_on_the_way(run: Path) -> None:
    code = (
        "import sys\nfrom tuner.cli import run_command\n"
        f"codes = [run_command(['status', {str(run)!r}]),"
        f" run_command(['export', {str(run)!r}, '--format', 'kohya']),"
        f" run_command(['sample', {str(run)!r}, '--prompt', 'x']),"
        " run_command(['export', 'nowhere'])]\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert codes == [0, 2, 2, 2], codes\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 3


def judged(folder: Path, values: Mapping[int, float], key: str = "evaluation/loss") -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": n, key: value}) + "\n" for n, value in values.items())


def test_what_was_judged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(run, 50)
    judged(run, {0: 0.9, 20: 0.5, 40: 0.3, 50: 0.4})
    judged(run, {0: 20.0, 50: 25.5}, "evaluation/clip_score")
    saved(run, 20)
    saved(run, 50)
    found = told(run)
    assert found.evaluation_losses == [(0, 0.9), (20, 0.5), (40, 0.3), (50, 0.4)]
    assert found.clip_scores == [(0, 20.0), (50, 25.5)]
    assert found.best is None and found.loss == pytest.approx(0.02)
    assert show_status(run, as_json=False) == DONE
    text = " ".join(capsys.readouterr().out.split())
    assert "evaluation 0.4 at step 50; 0.9 at first, best 0.3 at step 40" in text
    assert sparkline([0.9, 0.5, 0.3, 0.4]) in text
    assert "clip score 25.5 at step 50; 20 at first, best 25.5 at step 50" in text
    plan = read_run(run).plan
    assert plan is not None
    rules = evolve(plan.checkpoints, best="evaluation/loss")
    lock_path(run).write_text(lock.dumps(evolve(plan, checkpoints=rules)))
    assert told(run).best == 50  # 40 was better, but is not kept
    assert show_status(run, as_json=False) == DONE
    assert "the best of those kept is that of step 50" in capsys.readouterr().out


def test_numbers_that_are_none_are_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(run, 50)
    judged(run, {0: 0.9, 20: nan, 40: inf, 50: 0.4})
    judged(run, {0: nan}, "evaluation/clip_score")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51, "loss": NaN, "grad_norm": Infinity}\n')
    found = told(run)
    assert found.evaluation_losses == [(0, 0.9), (50, 0.4)] and found.clip_scores == []
    assert found.loss is None and found.grad_norm is None
    for as_json in (False, True):
        assert show_status(run, as_json=as_json) == DONE
    assert "NaN" not in capsys.readouterr().out


def test_a_line_of_blocks() -> None:
    assert sparkline([0.0, nan, 1.0, inf]) == "\u2581 \u2588 "
    assert sparkline([nan]) == " "
    assert sparkline([0.0, 1.0]) == "\u2581\u2588"
    assert sparkline([2.0, 2.0, 2.0]) == "\u2584" * 3
    assert len(sparkline([float(n) for n in range(100)], 10)) == 10
