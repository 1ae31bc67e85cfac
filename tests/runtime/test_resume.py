"""Resume as a law: what is stopped or killed goes on to the same bits, and nothing is torn."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from compiler import lock
from compiler.plan import Plan
from runtime import checkpoints
from runtime.context import result_folder
from tests.runtime.anew import Anew
from tests.runtime.plans import PICTURES
from tests.runtime.run_plan import Interrupting, run
from tests.runtime.whole_runs import (
    FLOAT32,
    MIXED,
    NEVER,
    RUNNING,
    assert_equal,
    fork,
    make,
    metrics_of,
    place,
    steps_done,
    wait,
)

__all__ = ["make", "place"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and POSIX signals")


PAIRS = [  # every two of them together
    pytest.param("sana", "lora", FLOAT32, id="sana-lora-float32"),
    pytest.param("sana", "full", MIXED, id="sana-full-mixed"),
    pytest.param("sd3", "lora", MIXED, id="sd3-lora-mixed"),
    pytest.param("sd3", "full", FLOAT32, id="sd3-full-float32"),
]


@pytest.mark.parametrize(("family", "method", "precision"), PAIRS)
def test_resume_is_bit_exact(make, family, method, precision):
    """Stopped in one process, killed in a second, finished in a third."""
    whole, manifest = make(family, method, "whole", precision=precision)
    parts, _ = make(family, method, "parts", precision=precision)
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
        path, out, err = (tmp_path / f"{plan.name}.{kind}" for kind in ("toml", "out", "err"))
        path.write_text(lock.dumps(plan))
        arguments = [path, tmp_path / "manifest.jsonl", *(["--at", *at] if at else [])]
        code = Anew(arguments, module="tests.runtime.run_plan", out=out, err=err).wait()
        print(out.read_text(), err.read_text())  # shown if the test fails
        return code

    assert start(whole) == 0
    assert start(parts, "step", "5", "SIGKILL") == -signal.SIGKILL
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
    assert count >= 8
    assert_equal(whole, parts)
    pictures = [sorted((Path(p.run_folder) / "samples").rglob("*.png")) for p in (whole, parts)]
    assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]]
    assert not list(Path(parts.run_folder).rglob(".partial-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), [("sana", "full"), ("sd3", "lora")])
def test_killed_at_random_moments(make, family, method):
    """Some steps and a random while after the last kill, whatever the process is doing then."""
    settings = {"validation": PICTURES, "steps": 24, "every": 3, "keep": 3}
    whole, manifest = make(family, method, "whole", **settings)
    assert wait(fork(lambda: run(whole, manifest, Interrupting(*NEVER)))) == 0
    parts, _ = make(family, method, "parts", **settings)
    chance = random.Random(5)
    kills, target = 0, 0
    while True:
        target += chance.randint(1, 8)
        pid = fork(lambda: run(parts, manifest, Interrupting(*NEVER)))
        while steps_done(parts) < target < 24 and os.waitid(os.P_PID, pid, RUNNING) is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        if target < 24:
            os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        kills += code == -signal.SIGKILL
        if code == 0:
            break
    assert kills >= 3
    assert_equal(whole, parts)


def test_ctrl_c_saves_and_exits_130(make, tmp_path):
    plan, manifest = make(every=0, steps=4000)
    manifest.save(tmp_path / "manifest.jsonl")
    (tmp_path / "plan.toml").write_text(lock.dumps(plan))
    metrics = Path(plan.run_folder) / "metrics.jsonl"
    arguments = [tmp_path / "plan.toml", tmp_path / "manifest.jsonl"]
    out, err = tmp_path / "out", tmp_path / "err"
    process = Anew(arguments, module="tests.runtime.run_plan", out=out, err=err)
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") >= 3:
            break
        assert process.poll() is None, err.read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    saved = checkpoints.complete(Path(plan.run_folder) / "checkpoints")
    assert len(saved) == 1
    step = checkpoints.read_state(saved[0])["step"]
    assert step >= 3
    assert out.read_text() == f"stopped {step} None\n"
    assert [row["step"] for row in metrics_of(plan)] == list(range(1, step + 1))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(make, name):
    whole, manifest = make(name="whole")
    parts, _ = make(name="parts")
    assert run(whole, manifest, Interrupting(*NEVER)) == 0
    assert run(parts, manifest, Interrupting("step", 5, signal.SIGTERM)) == 130
    root = Path(parts.run_folder) / "checkpoints"
    newest = root / "step-000005" / name
    newest.write_bytes(newest.read_bytes()[:-8] + bytes(8))
    events = Interrupting(*NEVER)
    assert run(parts, manifest, events) == 0
    assert any(f"{newest} is damaged" in text for text in events.texts)
    assert "going on from step 4 of 7" in events.texts
    assert (root / "damaged-step-000005").is_dir()
    assert_equal(whole, parts)
