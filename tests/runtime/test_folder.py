"""The run folder: one plan, one process, whole files."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from attrs import evolve

from compiler import lock
from compiler.plan import Checkpoints, lock_path
from compiler.site import Resume
from runtime import folder
from runtime.errors import InUse, PlanChanged, RunFailed
from runtime.site import resume
from runtime.speeds import METRICS
from tests.runtime.plans import PICTURES, draw_data, tiny_plan
from tests.runtime.tiny import make_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny("sana", tmp_path_factory.mktemp("sana"))


@pytest.fixture
def plan(base, tmp_path):
    return tiny_plan("sana", base, draw_data(tmp_path / "data"), tmp_path / "runs" / "one")[0]


def begun(plan):
    """The plan's run has done a step."""
    with folder.opened(plan, "") as place:
        (place / METRICS).write_text('{"step": 1}\n')


def test_the_plan_and_the_recipe_are_kept(plan):
    with folder.opened(plan, 'name = "one"\n') as place:
        assert (place / "recipe.toml").read_text() == 'name = "one"\n'
        assert lock.read(lock_path(place)).digest == plan.digest
    with folder.opened(plan, ""):
        assert (place / "recipe.toml").exists()


def test_another_plan_is_refused_with_what_differs(plan):
    begun(plan)
    text = lock_path(Path(plan.run_folder)).read_text()
    changed = evolve(plan, optimizer=evolve(plan.optimizer, lr=5e-4), max_grad_norm=0.5)
    with pytest.raises(PlanChanged) as caught, folder.opened(changed, ""):
        pytest.fail("opened")
    assert caught.value.changes == (
        ("optimizer.lr", "0.001", "0.0005"),
        ("max_grad_norm", "1.0", "0.5"),
    )
    assert "optimizer.lr: 0.001 -> 0.0005" in caught.value.message
    assert lock_path(Path(plan.run_folder)).read_text() == text


def test_a_run_that_has_trained_nothing_takes_another_plan(plan):
    """It ended while its caches were filled, or was killed while its first checkpoint was written:
    there is nothing that could be mixed."""
    place, changed = Path(plan.run_folder), evolve(plan, max_grad_norm=0.5)
    with folder.opened(plan, "first\n"):
        for name in (METRICS, "events.jsonl", "run.log", "manifest.jsonl", "report.html"):
            (place / name).write_text("" if name == METRICS else "x")
        (place / "checkpoints" / ".partial-step-000004").mkdir(parents=True)
        (place / "trackers").mkdir()
    assert resume(changed) == Resume(step=0, finished=False, changes=(), problem="")
    with folder.opened(changed, "second\n"):
        assert lock.read(lock_path(place)).digest == changed.digest
        assert (place / "recipe.toml").read_text() == "second\n"


@pytest.mark.parametrize(
    "made",
    [
        "checkpoints/step-000004/state.json",
        "checkpoints/damaged-step-000004/state.json",
        "samples/step-000000/a.png",
        "lora/x.safetensors",
        "model_ema/x.safetensors",
        "metrics.jsonl",
        "measured.json",
        "rung.json",
    ],
)
def test_what_a_plan_has_made_is_never_another_s(plan, made):
    changed = evolve(plan, max_grad_norm=0.5)
    with folder.opened(plan, "") as place:
        (place / made).parent.mkdir(parents=True, exist_ok=True)
        (place / made).write_text('{"step": 0}\n')
    found = resume(changed)
    assert found is not None and [key for key, _, _ in found.changes] == ["max_grad_norm"]
    with pytest.raises(PlanChanged), folder.opened(changed, ""):
        pytest.fail("opened")
    assert lock.read(lock_path(place)).digest == plan.digest


def test_what_alters_no_weight_may_change(plan):
    with folder.opened(plan, ""):
        pass
    changed = evolve(
        plan, checkpoints=Checkpoints(every=3, keep=1), validation=PICTURES, track=("tensorboard",)
    )
    with folder.opened(changed, ""):
        pass
    assert lock.read(lock_path(Path(plan.run_folder))).digest == changed.digest


def test_a_lock_that_is_no_plan(plan):
    place = Path(plan.run_folder)
    place.mkdir(parents=True)
    lock_path(place).write_text("format = 99\n")
    with pytest.raises(RunFailed, match="no plan that this version can go on with"):
        folder.opened(plan, "").__enter__()


def test_one_process_at_a_time(plan):
    script = f"""
        from pathlib import Path
        from compiler import lock
        from runtime import folder
        from runtime.errors import RunFailed
        plan = lock.read(Path({plan.run_folder!r}) / "plan.lock.toml")
        try:
            with folder.opened(plan, ""):
                print("opened")
        except RunFailed as error:
            print("refused:", error)
    """

    def other() -> str:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    with folder.opened(plan, ""):
        assert other().startswith("refused: another process is running")
    assert other() == "opened\n"


def test_what_a_killed_writer_left_is_removed(plan):
    place = Path(plan.run_folder)
    (place / "checkpoints" / ".partial-step-000004").mkdir(parents=True)
    (place / ".partial-measured.json").write_text("{")
    with folder.opened(plan, ""):
        assert list((place / "checkpoints").iterdir()) == []
        assert not (place / ".partial-measured.json").exists()


def test_an_unwritable_place_is_said(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="can't write the run folder") as caught:
        folder.opened(evolve(plan, run_folder=str(tmp_path / "file" / "run")), "").__enter__()
    assert "output" in caught.value.help


def test_space(tmp_path):
    folder.check_space(tmp_path, 1)
    with pytest.raises(RunFailed, match="GiB are free"):
        folder.check_space(tmp_path, 1 << 60)


def test_an_accepted_plan_is_the_run_s_only_once_it_is_taken_over(plan):
    place = Path(plan.run_folder)
    changed = evolve(plan, max_grad_norm=0.5)
    with folder.opened(plan, "first\n"):
        (place / "lora").mkdir()
        for name in (folder.MEASURED, "result.json"):
            (place / name).write_text("{}")
    folder.accept(changed, "second\n")
    for _ in range(2):  # opened, and ended before a checkpoint was loaded
        with folder.opened(changed, "second\n"):
            assert lock.read(lock_path(place)).digest == plan.digest
            assert (place / "recipe.toml").read_text() == "first\n"
    with pytest.raises(PlanChanged), folder.opened(evolve(plan, seed=8), ""):
        pytest.fail("opened")
    with folder.opened(changed, "second\n"):
        folder.take_over(place)
        assert lock.read(lock_path(place)).digest == changed.digest
        assert (place / "recipe.toml").read_text() == "second\n"
        left = {path.name for path in place.iterdir()}
        assert left == {".lock", "plan.lock.toml", "recipe.toml"}
        folder.take_over(place)  # nothing is waiting any more
    assert lock.read(lock_path(place)).digest == changed.digest


def test_the_run_s_own_plan_drops_one_that_was_accepted(plan):
    place, changed = Path(plan.run_folder), evolve(plan, max_grad_norm=0.5)
    begun(plan)
    folder.accept(changed, "")
    with folder.opened(plan, ""):
        assert not folder.is_accepted(place, changed)
    with pytest.raises(PlanChanged), folder.opened(changed, ""):
        pytest.fail("opened")


@pytest.mark.parametrize(
    ("device", "changes", "matters"),
    [
        ("cpu", {}, True),
        ("cuda", {}, False),
        ("cuda", {"offload_optimizer": True}, True),
        ("mps", {}, False),
    ],
)
def test_threads_matter_where_the_processor_computes(plan, device, changes, matters):
    plan = evolve(plan, device=device, sharing=evolve(plan.sharing, **changes))
    begun(plan)
    other = evolve(plan, threads=plan.threads + 3)
    if not matters:
        with folder.opened(other, ""):
            return
    with pytest.raises(PlanChanged) as caught, folder.opened(other, ""):
        pytest.fail("opened")
    assert [key for key, _, _ in caught.value.changes] == ["threads"]


@pytest.mark.parametrize("content", ["[1]", "1", "null", '"x"', "{", ""])
def test_a_damaged_measurement_is_none(tmp_path, content):
    (tmp_path / folder.MEASURED).write_text(content)
    assert folder.read_measured(tmp_path) is None


def test_one_who_only_asks_is_waited_for(plan):
    """`is_held` has a shared lock for an instant, in which a run may begin."""
    fcntl = pytest.importorskip("fcntl")
    place = Path(plan.run_folder)
    with folder.opened(plan, ""):
        pass
    with (place / folder.LOCK).open("rb") as asking:
        fcntl.flock(asking.fileno(), fcntl.LOCK_SH)
        threading.Timer(0.2, lambda: fcntl.flock(asking.fileno(), fcntl.LOCK_UN)).start()
        with folder.opened(plan, ""):
            assert folder.is_held(place)
        fcntl.flock(asking.fileno(), fcntl.LOCK_SH)
        with pytest.raises(InUse, match="another process"):
            folder.opened(plan, "").__enter__()


def test_whether_it_is_held_is_seen_without_holding_it(plan):
    place = Path(plan.run_folder)
    assert not folder.is_held(place)
    with folder.opened(plan, ""):
        assert folder.is_held(place)
        assert folder.is_held(place)
    assert not folder.is_held(place)
    with folder.opened(plan, ""):  # asking has not taken it
        pass
