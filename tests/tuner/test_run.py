"""`tuner run` around the runtime: exit codes, what is said, what is kept in the run folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import evolve

from compiler import lock
from compiler.data.manifest import Folder, Manifest
from compiler.optimizers import OPTIMIZERS
from compiler.plan import Plan, Rung, lock_path
from runtime import folder, saved
from runtime.errors import InUse, MachineUnfit, OutOfMemory, PlanChanged, RunFailed
from tests.tuner.examples import quickstart
from tuner import next_rung, run
from tuner.exits import DONE, FAILED, REFUSED, STOPPED, UNFIT
from tuner.plan_view import summary
from tuner.run import Job, below


@pytest.fixture
def job(tmp_path: Path) -> Job:
    manifest = Manifest([Folder(id="zorps", path="/zorps")], [])
    plan = evolve(
        quickstart(), run_folder=str(tmp_path / "runs" / "quickstart"), manifest=manifest.digest
    )
    return Job(plan=plan, manifest=manifest, recipe='name = "quickstart"\n')


def ends(monkeypatch: pytest.MonkeyPatch, *outcomes: Any) -> list[Plan]:
    """Let the runtime end as told, once for each call; returns the plans that it was given."""
    waiting, seen = list(outcomes), []

    def execute(job: Job) -> Any:
        seen.append(job.plan)
        Path(job.plan.run_folder).mkdir(parents=True, exist_ok=True)
        outcome = waiting.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(run, "_execute", execute)
    return seen


def outcome(job: Job, status: str) -> SimpleNamespace:
    folder = Path(job.plan.run_folder)
    return SimpleNamespace(
        status=status, run_folder=folder, step=120, result=folder / "lora", measured={}
    )


def test_a_finished_run_says_where_things_are(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends(monkeypatch, outcome(job, "finished"))
    assert run._run(job, ()) == DONE
    said, folder = capsys.readouterr(), job.plan.run_folder
    assert said.out.splitlines() == [
        f"result  {folder}/lora", f"report  {folder}/report.html", f"run     {folder}",
    ]  # fmt: skip
    assert "Plan: cache 30 images" in said.err
    assert (Path(folder) / "report.html").exists()


def test_a_stopped_run_is_exit_130_with_a_report(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends(monkeypatch, outcome(job, "stopped"))
    assert run._run(job, ()) == STOPPED
    said = capsys.readouterr()
    assert "stopped after step 120; run it again to go on" in said.err and said.out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunFailed("step 7: loss nan", help="lower the learning rate"), FAILED),
        (MachineUnfit("no cuda here", help="`tuner doctor` shows"), UNFIT),
    ],
)
def test_a_failure_is_a_sentence_and_a_code(
    error: RunFailed, code: int, job: Job, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ends(monkeypatch, error)
    assert run._run(job, ()) == code
    assert f"error: {error.message}\nhelp: {error.help}" in capsys.readouterr().err


def rung(micro_batch: int, *, chosen: bool) -> Rung:
    return Rung(
        settings={"memory.micro_batch": str(micro_batch)},
        peak_bytes=micro_batch,
        relative_time=1.0,
        alters=False,
        chosen=chosen,
    )


def going_down(job: Job, folder: Path, on_oom: str) -> tuple[Job, Plan]:
    """A job whose plan may go down the ladder, and the plan of the next rung."""
    ladder = (rung(2, chosen=True), rung(1, chosen=False))
    memory = evolve(job.plan.memory, on_oom=on_oom, ladder=ladder)
    plan = evolve(job.plan, memory=memory)
    phases = tuple(evolve(p, device_bytes=p.device_bytes // 2) for p in memory.phases)
    below = evolve(
        plan,
        steps=evolve(plan.steps, micro_batch=1),
        memory=evolve(memory, ladder=(rung(1, chosen=True),), phases=phases),
    )
    recipe = folder / "recipe.toml"
    recipe.write_text(job.recipe)
    return evolve(job, plan=plan, path=recipe), below


def test_out_of_memory_goes_on_with_the_next_rung(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, below = going_down(job, tmp_path, "next-rung")
    asked: list[next_rung.Lower] = []

    def compile_here(path: Path, overrides: tuple[str, ...], train_below: int) -> Any:
        asked.append(next_rung.Lower(overrides=overrides, train_below=train_below))
        return SimpleNamespace(plan=below, manifest=job.manifest, outlook=None)

    monkeypatch.setattr(next_rung, "compile_here", compile_here)
    error = OutOfMemory("cuda ran out of memory in phase train", "", "train")
    seen = ends(monkeypatch, error, outcome(job, "finished"))
    folder = Path(job.plan.run_folder)
    folder.mkdir(parents=True)
    lock_path(folder).write_text(lock.dumps(job.plan))
    assert run._run(job, ()) == DONE
    assert [plan.steps.micro_batch for plan in seen] == [0, 1]
    sizes = {phase.name: phase.device_bytes for phase in job.plan.memory.phases}
    budget, *kept = asked[0].overrides
    assert budget == f'memory.budget="{max(sizes.values())} B"'
    assert kept[0] == 'train.optimizer.name="adamw"'
    assert all(each.endswith('.quantize="none"') for each in kept[1:]) and len(kept) > 1
    assert asked[0].train_below == sizes["train"] - 1
    assert lock.read(lock_path(folder)).digest == below.digest
    said = capsys.readouterr().err
    assert "going on with the next rung: memory.micro_batch = 1" in said
    assert next_rung.gone_down(job.plan) == asked[0]


def test_out_of_memory_stops_where_the_recipe_says_so(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, _ = going_down(job, tmp_path, "stop")
    ends(monkeypatch, OutOfMemory("cuda ran out of memory in phase train", "say on_oom", "train"))
    assert run._run(job, ()) == FAILED
    assert "error: cuda ran out of memory in phase train\nhelp: say on_oom" in (
        capsys.readouterr().err
    )


def test_another_optimizer_is_no_way_on(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, below = going_down(job, tmp_path, "next-rung")
    other = evolve(below, optimizer=evolve(below.optimizer, name="adamw-8bit"))
    found = SimpleNamespace(plan=other, manifest=job.manifest, outlook=None)
    monkeypatch.setattr(next_rung, "compile_here", lambda *_, **__: found)
    ends(monkeypatch, OutOfMemory("no memory", "", "train"))
    assert run._run(job, ()) == FAILED


def changed(*keys: str) -> PlanChanged:
    rows = tuple((key, "1", "2") for key in keys)
    listed = "\n".join(f"  {key}: 1 -> 2" for key in keys)
    return PlanChanged(f"was begun with another plan; what differs:\n{listed}", "undo it", rows)


def test_offline_is_told_to_the_libraries_before_they_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in run.OFFLINE:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(run, "_from_recipe", lambda *_, **__: REFUSED)
    recipe = tmp_path / "recipe.toml"
    assert run.run_recipe(recipe, (), accepted=(), strict=False) == REFUSED
    assert os.environ["HF_HUB_OFFLINE"] == ""
    assert run.run_recipe(recipe, (), accepted=(), strict=False, offline=True) == REFUSED
    assert all(os.environ[name] == "1" for name in run.OFFLINE)


def test_a_changed_plan_is_exit_2_with_the_keys_and_a_way_on(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends(monkeypatch, changed("optimizer.lr"))
    assert run._run(job, ()) == REFUSED
    said = capsys.readouterr().err
    assert "optimizer.lr: 1 -> 2" in said and "--accept-change optimizer.lr" in said


def test_an_accepted_change_goes_on_with_the_new_plan(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = ends(monkeypatch, changed("optimizer.lr", "schedule.warmup"), outcome(job, "finished"))
    assert run._run(job, ("train.optimizer.lr", "schedule")) == DONE
    assert len(seen) == 2
    place = Path(job.plan.run_folder)
    assert folder.is_accepted(place, job.plan)  # the runtime takes it over, once it has loaded
    assert (place / folder.ACCEPTED / "recipe.toml").read_text() == job.recipe


def test_how_a_step_is_computed_may_change(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint's shape rests on it."""
    ends(monkeypatch, changed("speed.fused_projections"), outcome(job, "finished"))
    assert run._run(job, ("speed",)) == DONE


def begun(job: Job, step: int, *, finished: bool) -> None:
    """The run's folder after `step` steps."""
    place = saved.folder_of(Path(job.plan.run_folder) / "checkpoints", step)
    place.mkdir(parents=True)
    (place / "state.json").write_text(json.dumps({"step": step, "files": {}}))
    if finished:
        (Path(job.plan.run_folder) / folder.MEASURED).write_text("{}")


@pytest.mark.parametrize(
    ("done", "finished", "why"),
    [
        (6, True, ""),
        (9, False, ""),
        (9, True, "it can only be given more steps than 9"),
        (12, False, "12 steps are done, and it can't go back to 9"),
    ],
)
def test_an_end_that_lies_behind_is_no_way_on(
    done: int, finished: bool, why: str, job: Job, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    job = evolve(job, plan=evolve(job.plan, steps=evolve(job.plan.steps, total=9)))
    begun(job, done, finished=finished)
    ends(monkeypatch, changed("steps.total"), changed("steps.total"), outcome(job, "finished"))
    assert run._run(job, ()) == REFUSED  # what helps is said, and nothing else
    said = capsys.readouterr().err
    assert why in said and ("--accept-change steps.total" in said) == (not why)
    assert run._run(job, ("steps.total",)) == (REFUSED if why else DONE)
    assert folder.is_accepted(Path(job.plan.run_folder), job.plan) == (not why)


def test_a_finished_run_without_a_checkpoint_is_at_its_end(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(job, 9, finished=True)
    shutil.rmtree(Path(job.plan.run_folder) / "checkpoints")
    ends(monkeypatch, changed("steps.total"))
    assert run._run(job, ("steps.total",)) == REFUSED
    assert "no checkpoint left to go on from" in capsys.readouterr().err


def test_arguments_that_shape_the_state_are_never_accepted(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = dict(OPTIMIZERS["prodigy"].defaults)
    prodigy = evolve(job.plan.optimizer, name="prodigy", arguments=arguments)
    job = evolve(job, plan=evolve(job.plan, optimizer=prodigy))
    ends(
        monkeypatch,
        changed("optimizer.arguments.slice_p"),
        changed("optimizer.arguments.d_coef"),
        outcome(job, "finished"),
    )
    assert run._run(job, ("optimizer.arguments",)) == REFUSED
    assert "--accept-change" not in capsys.readouterr().err
    assert run._run(job, ("optimizer.arguments",)) == DONE


def test_other_threads_are_accepted_and_their_key_is_named(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends(monkeypatch, changed("threads"), changed("threads"), outcome(job, "finished"))
    assert run._run(job, ()) == REFUSED
    said = capsys.readouterr().err
    assert "--accept-change threads" in said and "`--set launch.threads=1`" in said
    assert run._run(job, ("threads",)) == DONE


def test_a_folder_in_use_gets_no_report(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    ends(monkeypatch, InUse("another process is running it"))
    assert run._run(job, ()) == FAILED
    assert list(Path(job.plan.run_folder).iterdir()) == []


@pytest.mark.parametrize("key", ["adapter.rank", "seed"])
def test_what_a_checkpoint_rests_on_is_never_accepted(
    key: str, job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends(monkeypatch, changed(key))
    assert run._run(job, (key,)) == REFUSED
    assert "--accept-change" not in capsys.readouterr().err


def test_keys_lie_below_names() -> None:
    assert below("optimizer.lr", ["train.optimizer.lr"]) and below("schedule.warmup", ["schedule"])
    assert not below("schedules", ["schedule"]) and not below("steps.total", [])


def test_a_saved_plan_runs_with_its_list_of_samples(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "plan.lock.toml"
    path.write_text(lock.dumps(job.plan))
    job.manifest.save(tmp_path / run.MANIFEST)
    seen = ends(monkeypatch, outcome(job, "finished"))
    assert run.run_recipe(path, (), accepted=(), strict=False) == DONE
    assert seen == [job.plan]


def test_a_run_that_was_moved_goes_on_where_it_lies(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = Path(job.plan.run_folder), tmp_path / "moved"
    first.mkdir(parents=True)
    (first / ".lock").touch()
    lock_path(first).write_text(lock.dumps(job.plan))
    job.manifest.save(first / run.MANIFEST)
    seen = ends(monkeypatch, *[outcome(job, "finished")] * 2)
    assert run.run_recipe(lock_path(first), (), accepted=(), strict=False) == DONE
    assert "begun in" not in capsys.readouterr().err and seen == [job.plan]
    shutil.rmtree(tmp_path / "moved", ignore_errors=True)
    first.rename(other)
    assert run.run_recipe(lock_path(other), (), accepted=(), strict=False) == DONE
    assert f"was begun in {first}; it goes on in {other}" in capsys.readouterr().err
    assert seen[1] == evolve(job.plan, run_folder=str(other)) and not first.exists()


@pytest.mark.slow
def test_a_folder_that_another_process_runs_in_is_left_alone_and_nothing_else_is_said(
    job: Job, tmp_path: Path
) -> None:
    path = tmp_path / "plan.lock.toml"
    path.write_text(lock.dumps(job.plan))
    job.manifest.save(tmp_path / run.MANIFEST)
    with folder.opened(job.plan, ""):
        there = {each: each.stat().st_mtime_ns for each in Path(job.plan.run_folder).rglob("*")}
        done = subprocess.run(
            [sys.executable, "-m", "tuner", "run", str(path)], capture_output=True, text=True
        )
        after = {each: each.stat().st_mtime_ns for each in Path(job.plan.run_folder).rglob("*")}
    assert done.returncode == FAILED and done.stdout == ""
    assert done.stderr.splitlines() == [
        *summary(job.plan).splitlines(),
        f"error: another process is running {job.plan.run_folder}",
        "help: wait for it, or stop it first",
    ]
    assert after == there


@pytest.mark.parametrize("fault", ["no manifest", "other manifest", "no plan", "override"])
def test_a_saved_plan_that_does_not_hold_together_is_refused(
    fault: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.lock.toml"
    path.write_text("x = 1" if fault == "no plan" else lock.dumps(job.plan))
    other = Manifest([Folder(id="other", path="/other")], [])
    if fault != "no manifest":
        (other if fault == "other manifest" else job.manifest).save(tmp_path / run.MANIFEST)
    overrides = ("seed=1",) if fault == "override" else ()
    assert run.run_recipe(path, overrides, accepted=(), strict=False) == REFUSED
    assert "help: run the recipe instead" in capsys.readouterr().err


def test_the_list_of_samples_is_kept_for_a_new_run_only(job: Job) -> None:
    folder = Path(job.plan.run_folder)
    run._keep_manifest(job)
    assert Manifest.load(folder / run.MANIFEST).digest == job.plan.manifest
    (folder / run.MANIFEST).unlink()
    lock_path(folder).write_text("begun earlier")
    run._keep_manifest(job)
    assert not (folder / run.MANIFEST).exists()


def test_the_list_of_samples_follows_the_plan_until_one_has_trained(job: Job) -> None:
    """Nor is it taken from a run that is at work."""
    fcntl = pytest.importorskip("fcntl")
    place = Path(job.plan.run_folder)
    other = Manifest([Folder(id="other", path="/other")], [])
    plan = evolve(job.plan, manifest=other.digest)
    for locked in (False, True):
        other.save(place / run.MANIFEST) if locked else place.mkdir(parents=True)
        if locked:
            lock_path(place).write_text(lock.dumps(plan))
            with (place / folder.LOCK).open("a+b") as held:
                fcntl.flock(held.fileno(), fcntl.LOCK_EX)
                run._keep_manifest(job)
            assert Manifest.load(place / run.MANIFEST).digest == other.digest
        run._keep_manifest(job)
        assert Manifest.load(place / run.MANIFEST).digest == job.plan.manifest
        assert not lock_path(place).exists()
    other.save(place / run.MANIFEST)
    lock_path(place).write_text(lock.dumps(plan))
    (place / "metrics.jsonl").write_text('{"step": 1}\n')
    run._keep_manifest(job)
    assert Manifest.load(place / run.MANIFEST).digest == other.digest
    assert lock.read(lock_path(place)).digest == plan.digest
