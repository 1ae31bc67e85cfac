"""Checkpoints are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from compiler.plan import Checkpoints
from runtime import checkpoints, files
from runtime.checkpoints import Snapshot
from runtime.errors import RunFailed
from runtime.saving import prune

ROOT = Path(__file__).parents[2]


def snapshot(step: int, plan: str = "digest", size: int = 100, ema: bool = True) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(size, generator=generator), "b": torch.ones(2).bfloat16()}
    return Snapshot(
        step=step,
        epoch=1,
        plan=plan,
        weights=weights,
        optimizer={"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        ema={k: v * 2 for k, v in weights.items()} if ema else None,
        versions={"torch": torch.__version__},
    )


@pytest.mark.parametrize("ema", [True, False])
def test_what_is_saved_comes_back(tmp_path, ema):
    folder = checkpoints.save(tmp_path, snapshot(400, ema=ema))
    assert folder == tmp_path / "step-000400"
    loaded, saved = checkpoints.load(folder), snapshot(400, ema=ema)
    assert {k: v.dtype for k, v in loaded.weights.items()} == {
        k: v.dtype for k, v in saved.weights.items()
    }
    assert all(torch.equal(loaded.weights[k], saved.weights[k]) for k in saved.weights)
    assert (loaded.step, loaded.epoch, loaded.plan) == (400, 1, "digest")
    assert (loaded.ema is None) is not ema
    assert loaded.optimizer["state"][0]["step"].item() == 3.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000400"]


def test_latest_is_found_by_looking_and_torn_ones_are_not_seen(tmp_path):
    assert checkpoints.latest(tmp_path / "absent") is None
    for step in (2, 10, 1_000_000):
        checkpoints.save(tmp_path, snapshot(step))
    assert checkpoints.latest(tmp_path) == tmp_path / "step-1000000"
    (tmp_path / "step-1000000" / "weights.safetensors").write_bytes(b"cut")
    assert checkpoints.latest(tmp_path) == tmp_path / "step-000010"
    (tmp_path / "step-000010" / "state.json").write_text("{")
    (tmp_path / "step-000099").mkdir()
    (tmp_path / ".partial-step-000011").mkdir()
    assert checkpoints.latest(tmp_path) == tmp_path / "step-000002"
    assert files.clean(tmp_path) == [".partial-step-000011"]


def test_a_torn_one_is_replaced_and_a_complete_one_kept(tmp_path):
    folder = checkpoints.save(tmp_path, snapshot(5))
    before = (folder / "weights.safetensors").stat().st_ino
    checkpoints.save(tmp_path, snapshot(5))
    assert (folder / "weights.safetensors").stat().st_ino == before
    (folder / "optimizer.pt").unlink()
    checkpoints.save(tmp_path, snapshot(5))
    assert checkpoints.is_complete(folder)
    checkpoints.save(tmp_path, snapshot(5, plan="another"))
    assert checkpoints.read_state(folder)["plan"] == "another"


def test_keep(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoints.save(tmp_path, snapshot(step))
    metrics = tmp_path.parent / "metrics.jsonl"
    assert prune(tmp_path, Checkpoints(every=1, keep=0), metrics) == []
    gone = prune(tmp_path, Checkpoints(every=1, keep=2), metrics)
    assert [p.name for p in gone] == ["step-000001", "step-000002"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("failing", ["save_file", "torch.save", "state.json"])
def test_a_write_that_fails_loses_nothing_older(tmp_path, monkeypatch, failing):
    checkpoints.save(tmp_path, snapshot(1))

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    match failing:
        case "save_file":
            monkeypatch.setattr(checkpoints, "save_file", full)
        case "torch.save":
            monkeypatch.setattr(checkpoints.torch, "save", full)
        case _:
            monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunFailed, match="No space left") as caught:
        checkpoints.save(tmp_path, snapshot(2))
    assert "goes on from step 1" in caught.value.help
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001"]
    assert checkpoints.latest(tmp_path) == tmp_path / "step-000001"


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX processes")
@pytest.mark.parametrize("limit", [1 << 12, 1 << 18])
def test_a_real_write_error_loses_nothing_older(tmp_path, limit):
    """The system itself refuses to write past a limit, inside the libraries' own writers."""
    checkpoints.save(tmp_path, snapshot(1))
    script = f"""
        import resource, signal
        from pathlib import Path
        from runtime import checkpoints
        from runtime.errors import RunFailed
        from tests.runtime.test_checkpoints import snapshot
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            checkpoints.save(Path({str(tmp_path)!r}), snapshot(2, size=1 << 17))
        except RunFailed as error:
            print("failed:", error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True
    )
    assert "failed: could not save the checkpoint of step 2" in done.stdout, done.stderr
    assert checkpoints.complete(tmp_path) == [tmp_path / "step-000001"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001"]


@pytest.mark.skipif(sys.platform == "win32", reason="kills a POSIX process")
def test_killed_while_saving(tmp_path):
    """A writer is killed again and again; no reader ever sees a torn checkpoint."""
    script = f"""
        from pathlib import Path
        from compiler.plan import Checkpoints
        from runtime import checkpoints
        from runtime.saving import prune
        from tests.runtime.test_checkpoints import snapshot
        folder = Path({str(tmp_path)!r})
        print("ready", flush=True)
        for step in range(1, 1000):
            checkpoints.save(folder, snapshot(step, size=1 << 16))
            prune(folder, Checkpoints(every=1, keep=2), folder / "none")
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            visible = [p for p in tmp_path.iterdir() if p.name.startswith("step-")]
            for folder in visible:
                assert checkpoints.is_complete(folder) or not folder.exists()
        os.kill(process.pid, signal.SIGKILL)
    newest = checkpoints.latest(tmp_path)
    assert newest is not None
    loaded = checkpoints.load(newest)
    expected = snapshot(loaded.step, size=1 << 16)
    assert torch.equal(loaded.weights["a.weight"], expected.weights["a.weight"])
    files.clean(tmp_path)
    assert all(p.name.startswith("step-") for p in tmp_path.iterdir())
