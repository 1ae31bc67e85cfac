"""Whole runs of tiny pipelines: resume as a law, results that Diffusers loads, nothing torn."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attrs import evolve

from compiler import lock
from compiler.plan import Checkpoints, Plan
from runtime import checkpoints
from runtime.errors import PlanChanged, RunFailed
from runtime.execute import execute, result_folder
from tests.runtime.plans import LORA, PICTURES, draw_data, source_of, tiny_plan
from tests.runtime.run_plan import Interrupting, run
from tests.runtime.tiny import make_tiny

ROOT = Path(__file__).parents[2]
SIZES = ((70, 70), (70, 70), (140, 70), (64, 64), (70, 140))
NEVER = ("", 0, signal.SIGTERM)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and POSIX signals")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny pipelines and data, made once; caches are shared by all runs, as they are in life."""
    folder = tmp_path_factory.mktemp("execute")
    for family in ("sana", "sd3"):
        make_tiny(family, folder / family)
    draw_data(folder / "dog", SIZES)
    draw_data(folder / "cat", SIZES[:2])
    return folder


@pytest.fixture
def make(place, tmp_path):
    """A maker of plans, each with a run folder of its own below this test's folder."""

    def made(family: str = "sana", method: str = "lora", name: str = "run", **changes):
        sources = (
            source_of(place / "dog", "a photo of sks dog", repeats="1.5", dropout=0.3),
            source_of(place / "cat", "a photo of sks cat"),
        )
        settings = {
            "steps": 7,
            "accumulate": 2,
            "every": 2,
            "adapter": evolve(LORA, dropout=0.2) if method == "lora" else None,
            "cache_folder": str(place / "cache"),
            **changes,
        }
        return tiny_plan(family, place / family, sources, tmp_path / name, **settings)

    return made


def final(plan: Plan):
    """Everything that a run leaves: every tensor by name, and the metrics but for the time."""
    saved = checkpoints.latest(Path(plan.run_folder) / "checkpoints")
    assert saved is not None
    snapshot = checkpoints.load(saved)
    tensors = {f"weights.{k}": v for k, v in snapshot.weights.items()}
    tensors |= {f"ema.{k}": v for k, v in (snapshot.ema or {}).items()}
    for index, states in snapshot.optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in states.items()}
    for file in sorted(result_folder(plan).rglob("*.safetensors")):
        from safetensors.torch import load_file

        tensors |= {f"{file.name}.{k}": v for k, v in load_file(file).items()}
    return snapshot.step, tensors, metrics_of(plan)


def metrics_of(plan: Plan) -> list[dict[str, object]]:
    lines = (Path(plan.run_folder) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row.pop("seconds")
    return rows


def assert_equal(plan: Plan, other: Plan) -> None:
    (step, tensors, metrics), (step_b, tensors_b, metrics_b) = final(plan), final(other)
    assert step == step_b
    assert tensors.keys() == tensors_b.keys()
    different = [k for k, v in tensors.items() if not torch.equal(v, tensors_b[k])]
    assert different == []
    assert metrics == metrics_b
    assert [row["step"] for row in metrics] == list(range(1, step + 1))


def fork(task: Callable[[], int]) -> int:
    """Runs `task` in a process of its own; returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = task()
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """The exit code of `pid`, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_run_leaves_what_it_says_and_runs_once(make):
    plan, manifest = make(validation=PICTURES, track=("tensorboard",), keep=2)
    events = Interrupting(*NEVER)
    outcome = execute(plan, manifest, events, recipe='name = "run"\n')
    folder = Path(plan.run_folder)
    assert (outcome.status, outcome.step, outcome.result) == ("finished", 7, folder / "lora")
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "lora",
        "measured.json",
        "metrics.jsonl",
        "plan.lock.toml",
        "recipe.toml",
        "run.log",
        "samples",
        "tensorboard",
    ]
    assert [p.name for p in checkpoints.complete(folder / "checkpoints")] == [
        "step-000006",
        "step-000007",
    ]
    assert sorted(str(p.relative_to(folder)) for p in (folder / "samples").rglob("*.png")) == [
        f"samples/step-{step:06d}/dog-64x64-42.png" for step in (0, 4, 7)
    ]
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["plan"] == plan.digest
    assert measured["steps"] == 7
    assert measured["seconds"].keys() >= {"text", "latents", "load", "train", "save", "validate"}

    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    again = Interrupting(*NEVER)
    outcome = execute(plan, manifest, again)
    assert (outcome.status, outcome.result) == ("already", folder / "lora")
    assert "nothing to do" in again.texts[0]
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert {p.name for p, t in after.items() if before.get(p) != t} <= {"plan.lock.toml"}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_resume_is_bit_exact(make, family, method):
    """Stopped in one process, killed in a second, finished in a third."""
    whole, manifest = make(family, method, "whole")
    parts, _ = make(family, method, "parts")
    assert run(whole, manifest, Interrupting(*NEVER)) == 0
    assert wait(fork(lambda: run(parts, manifest, Interrupting("step", 3, signal.SIGTERM)))) == 130
    latest = checkpoints.latest(Path(parts.run_folder) / "checkpoints")
    assert latest is not None
    assert latest.name == "step-000003"
    assert not result_folder(parts).exists()
    killed = fork(lambda: run(parts, manifest, Interrupting("step", 2, signal.SIGKILL)))
    assert wait(killed) == -signal.SIGKILL
    assert wait(fork(lambda: run(parts, manifest, Interrupting(*NEVER)))) == 0
    assert_equal(whole, parts)


@pytest.mark.slow
def test_in_new_interpreters_too(make, tmp_path):
    """No state of this process may matter: the same with processes started from nothing."""
    whole, manifest = make("sd3", "lora", "whole")
    parts, _ = make("sd3", "lora", "parts")
    manifest.save(tmp_path / "manifest.jsonl")

    def start(plan: Plan, *at: str) -> int:
        path = tmp_path / f"{plan.name}.toml"
        path.write_text(lock.dumps(plan))
        command = [
            sys.executable,
            "-m",
            "tests.runtime.run_plan",
            path,
            tmp_path / "manifest.jsonl",
        ]
        extra = ["--at", *at] if at else []
        return subprocess.run([*command, *extra], cwd=ROOT, capture_output=True).returncode

    assert start(whole) == 0
    assert start(parts, "step", "3", "SIGINT") == 130
    assert start(parts, "step", "2", "SIGKILL") == -signal.SIGKILL
    assert start(parts) == 0
    assert_equal(whole, parts)


PHASES = [("phase:text", 1), ("phase:latents", 1), ("phase:load", 1), ("phase:validate", 1)]
PHASES += [("phase:train", 1), ("phase:save", 1), ("phase:save", 2), ("phase:validate", 2)]


@pytest.mark.slow
def test_killed_at_chosen_points(make, tmp_path):
    """In caching, stepping, saving, drawing and publishing; each time the run goes on.

    After the phases, each process is killed one write to the disk later than the one before.
    """
    settings = {"validation": PICTURES, "keep": 2, "steps": 20, "every": 3}
    whole, manifest = make("sana", "lora", "whole", **settings)
    assert wait(fork(lambda: run(whole, manifest, Interrupting(*NEVER)))) == 0
    parts, _ = make("sana", "lora", "parts", **settings, cache_folder=str(tmp_path / "cache"))
    points = PHASES + [("sync", count) for count in range(1, 60)]
    for event, count in points:
        at = Interrupting(event, count, signal.SIGKILL)
        code = wait(fork(lambda at=at: run(parts, manifest, at)))
        if code == 0:
            break
        assert code == -signal.SIGKILL, (event, count)
    assert code == 0
    assert count >= 10
    assert_equal(whole, parts)
    pictures = [sorted((Path(p.run_folder) / "samples").rglob("*.png")) for p in (whole, parts)]
    assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]]
    assert not list(Path(parts.run_folder).rglob(".partial-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), [("sana", "full"), ("sd3", "lora")])
def test_killed_at_random_moments(make, family, method):
    settings = {"validation": PICTURES, "steps": 20, "every": 3, "keep": 3}
    whole, manifest = make(family, method, "whole", **settings)
    begun = time.monotonic()
    assert wait(fork(lambda: run(whole, manifest, Interrupting(*NEVER)))) == 0
    length = time.monotonic() - begun
    parts, _ = make(family, method, "parts", **settings)
    chance = random.Random(5)
    kills = 0
    for _ in range(60):
        pid = fork(lambda: run(parts, manifest, Interrupting(*NEVER)))
        time.sleep(chance.uniform(0.1, 0.6) * length)
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        kills += code == -signal.SIGKILL
        if code == 0:
            break
    else:
        pytest.fail("the run made no progress between kills")
    assert kills >= 2
    assert_equal(whole, parts)


def test_ctrl_c_saves_and_exits_130(make, tmp_path):
    plan, manifest = make(every=0, steps=4000)
    manifest.save(tmp_path / "manifest.jsonl")
    (tmp_path / "plan.toml").write_text(lock.dumps(plan))
    metrics = Path(plan.run_folder) / "metrics.jsonl"
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.runtime.run_plan",
            tmp_path / "plan.toml",
            tmp_path / "manifest.jsonl",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(1200):
            if metrics.exists() and metrics.read_text().count("\n") >= 3:
                break
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    saved = checkpoints.complete(Path(plan.run_folder) / "checkpoints")
    assert len(saved) == 1
    step = checkpoints.read_state(saved[0])["step"]
    assert step >= 3
    assert output == f"stopped {step} None\n"
    assert [row["step"] for row in metrics_of(plan)] == list(range(1, step + 1))


def test_pictures_do_not_change_the_training(make):
    without, manifest = make(name="without")
    with_pictures, _ = make(name="with", validation=evolve(PICTURES, every=1))
    for plan in (without, with_pictures):
        assert run(plan, manifest, Interrupting(*NEVER)) == 0
    assert_equal(without, with_pictures)
    assert len(list((Path(with_pictures.run_folder) / "samples").rglob("*.png"))) == 8


def test_checkpoints_do_not_change_the_training(make):
    often, manifest = make(name="often", checkpoints=Checkpoints(every=1, keep=1))
    never, _ = make(name="never", checkpoints=Checkpoints(every=0, keep=0))
    for plan in (often, never):
        assert run(plan, manifest, Interrupting(*NEVER)) == 0
    assert_equal(often, never)


def test_another_plan_in_the_same_folder_is_refused(make):
    plan, manifest = make(steps=2)
    assert run(plan, manifest, Interrupting(*NEVER)) == 0
    with pytest.raises(PlanChanged, match=r"optimizer\.lr"):
        execute(
            evolve(plan, optimizer=evolve(plan.optimizer, lr=1.0)), manifest, Interrupting(*NEVER)
        )


def test_a_full_disk_loses_nothing_older(make, monkeypatch):
    plan, manifest = make(every=2)
    written = checkpoints._write

    def full(folder, snapshot):
        written(folder, snapshot)
        if snapshot.step == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_write", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        execute(plan, manifest, Interrupting(*NEVER))
    root = Path(plan.run_folder) / "checkpoints"
    assert [p.name for p in root.iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert run(plan, manifest, Interrupting(*NEVER)) == 0
    whole, _ = make(name="whole")
    assert run(whole, manifest, Interrupting(*NEVER)) == 0
    assert_equal(whole, plan)


def test_scores(make):
    plan, manifest = make(
        steps=2,
        validation=evolve(
            PICTURES,
            every=0,
            score="shapes",
            seeds=(1, 2),
            prompts=(
                evolve(PICTURES.prompts[0], name="red circle", text="a red circle"),
                evolve(PICTURES.prompts[0], name="a/b", text="nothing that can be scored"),
            ),
        ),
    )
    assert run(plan, manifest, Interrupting(*NEVER)) == 0
    folder = Path(plan.run_folder) / "samples" / "step-000002"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["scored"] == 2
    assert scores["prompts"].keys() == {"red circle"}
    assert 0.0 <= scores["mean"] <= 1.0
    assert scores["weights"] == "ema"
    assert (folder / "a%2Fb-64x64-1.png").exists()
