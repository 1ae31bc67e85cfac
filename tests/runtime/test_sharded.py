"""Ranks that share every weight out train as one process does, save together and go on."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from compiler.plan import Ema, Sharing
from runtime import checkpoints
from runtime.context import result_folder, saved_step
from runtime.events import Silent
from runtime.execute import execute
from tests.runtime.plans import PICTURES
from tests.runtime.test_ranks_run import assert_close, launched, make, place, start, until_step
from tests.runtime.whole_runs import MIXED, assert_equal, final, metrics_of, wait

__all__ = ["make", "place"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")
FSDP = Sharing(strategy="fsdp")


@pytest.fixture
def shared(make):
    """As `make`, the plan of several processes being sharded."""

    def made(*arguments, sharing=FSDP, **changes):
        together, alone, manifest = make(*arguments, **changes)
        return evolve(together, sharing=sharing), alone, manifest

    return made


CASES = {
    2: [("sana", "lora", 1, {"validation": PICTURES}), ("sd3", "full", 2, {"optimizer": "sgd"})],
    3: [("sana", "full", 1, {"optimizer": "sgd", "validation": PICTURES}), ("sd3", "lora", 2, {})],
}


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_ranks_train_as_one_process_does(shared, ranks):
    pairs = [
        shared(family, method, ranks, accumulate, f"{family}-{method}", **changes)
        for family, method, accumulate, changes in CASES[ranks]
    ]
    assert any(p.steps.batches_per_epoch % (p.steps.accumulate * ranks) for p, _, _ in pairs)
    processes = start([(together, manifest) for together, _, manifest in pairs], ranks)
    assert [wait(pid) for pid in processes] == [0] * ranks
    for together, alone, manifest in pairs:
        execute(alone, manifest, Silent())
        # Adam divides a gradient by its own size, which magnifies how the smallest are rounded.
        assert_close(together, alone, 1e-5 if together.optimizer.name == "sgd" else 2e-4)
        assert results(together).keys() == results(alone).keys()
        for name, tensor in results(alone).items():
            torch.testing.assert_close(results(together)[name], tensor, rtol=1e-3, atol=1e-6)
        assert len(drawn(together)) == len(drawn(alone)) == 3 * bool(together.validation.prompts)


def results(plan) -> dict[str, torch.Tensor]:
    """All tensors of the run's result."""
    found = {}
    for path in sorted(result_folder(plan).rglob("*.safetensors")):
        found |= load_file(path)
    return found


def drawn(plan) -> list[Path]:
    return sorted(Path(plan.run_folder).rglob("samples/*/*.png"))


def begun(plan, other, step: str) -> None:
    """Let `plan` go on from where `other` was after `step`."""
    for part in (f"checkpoints/{step}", "metrics.jsonl"):
        source, target = Path(other.run_folder) / part, Path(plan.run_folder) / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def test_they_go_on_from_each_others_checkpoints(shared):
    """Bit for bit with as many ranks; with others, or with one process, up to rounding."""
    changes = {"every": 3, "optimizer": "sgd", "ema": Ema(decay=0.9, device="cpu", every=1)}
    two, alone, manifest = shared("sana", "full", 2, 3, "two", **changes)
    again = evolve(two, name="again", run_folder=f"{two.run_folder}-again")
    from_one = evolve(two, name="from-one", run_folder=f"{two.run_folder}-from-one")
    three = evolve(
        two,
        name="three",
        run_folder=f"{two.run_folder}-three",
        steps=evolve(two.steps, ranks=3, accumulate=2),
    )
    one = evolve(alone, name="one", run_folder=f"{two.run_folder}-one")
    execute(alone, manifest, Silent())
    assert [wait(pid) for pid in start([(two, manifest)], 2)] == [0, 0]
    assert_close(two, alone, 1e-5)
    for plan, other in ((again, two), (from_one, alone), (three, two), (one, two)):
        begun(plan, other, "step-000003")
    jobs = [(again, manifest), (from_one, manifest)]
    assert [wait(pid) for pid in start(jobs, 2)] == [0, 0]
    assert_equal(again, two)
    assert_close(from_one, alone, 1e-5)
    assert [wait(pid) for pid in start([(three, manifest)], 3)] == [0, 0, 0]
    assert_close(three, alone, 1e-5)
    execute(one, manifest, Silent())
    assert_close(one, alone, 1e-5)
    assert checkpoints.read_state(Path(two.run_folder) / "checkpoints/step-000003")["sharded"]


def test_masters_are_float32_and_what_computes_is_bfloat16(shared):
    """The steps of one process with float32 masters, up to bfloat16's rounding of gradients."""
    together, alone, manifest = shared(
        "sd3", "full", 2, 1, "mixed", precision=MIXED, optimizer="sgd", validation=PICTURES
    )
    assert [wait(pid) for pid in start([(together, manifest)], 2)] == [0, 0]
    execute(alone, manifest, Silent())
    (_, mine, metrics), (_, others, metrics_b) = final(together), final(alone)
    for name, tensor in others.items():
        if name.startswith("weights."):
            assert mine[name].dtype == torch.float32
            torch.testing.assert_close(mine[name], tensor, rtol=1e-2, atol=1e-4)
    for row, row_b in zip(metrics, metrics_b, strict=True):
        assert row["loss"] == pytest.approx(row_b["loss"], rel=1e-2)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_goes_on_later(shared, tmp_path):
    plan, _, manifest = shared("sana", "lora", 2, 1, steps=40000, every=4)
    pid = launched(plan, manifest, tmp_path, anew=False)
    until_step(plan, 10)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    began = time.monotonic()
    assert wait(pid) == 1
    assert time.monotonic() - began < 20
    assert "rank 1 was killed (SIGKILL)" in (tmp_path / "said").read_text()
    saved = saved_step(Path(plan.run_folder))
    assert saved >= 8 and saved % 4 == 0, "what was saved by all; rank 0 alone has only its part"

    pid = launched(plan, manifest, tmp_path, anew=False)
    until_step(plan, saved + 3)
    os.kill(pid, signal.SIGINT)
    assert wait(pid) == 130
    stopped = saved_step(Path(plan.run_folder))
    assert (tmp_path / "said").read_text() == f"stopped {stopped}"
    assert stopped >= saved + 3
    assert [row["step"] for row in metrics_of(plan)] == list(range(1, stopped + 1))


def test_a_rank_that_cant_write_leaves_older_checkpoints_alone(shared):
    plan, _, manifest = shared("sana", "lora", 2, 1, steps=6, every=2)

    def full_disk(rank: int) -> None:
        stock, saves = FileSystemWriter.write_data, []

        def write_data(self, *arguments):
            saves.append(1)
            if rank == 1 and len(saves) == 2:
                raise OSError(28, "No space left on device")
            return stock(self, *arguments)

        FileSystemWriter.write_data = write_data

    first, second = (wait(pid) for pid in start([(plan, manifest)], 2, full_disk))
    # Rank 0 tells of it, and may be gone before the other one has heard that it could.
    assert first == 1 and second in (1, 3)
    folder = Path(plan.run_folder)
    said = (folder / "failed-0").read_text()
    assert "could not save the checkpoint of step 4" in said
    assert "No space left on device" in said and "goes on from step 2" in said
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]


def test_training_goes_on_while_parts_are_written(shared):
    """What one rank writes of step 2 waits until step 4 is done."""
    plan, _, manifest = shared("sana", "lora", 2, 1, steps=6, every=2)

    def slow_disk(rank: int) -> None:
        stock, saves = FileSystemWriter.write_data, []

        def write_data(self, *arguments):
            saves.append(1)
            if rank == 1 and len(saves) == 1:
                until = time.monotonic() + 60
                while not any(row["step"] >= 3 for row in metrics_of(plan)):
                    if time.monotonic() > until:
                        raise OSError(5, "training waits for what waits for it")
                    time.sleep(0.02)
            return stock(self, *arguments)

        FileSystemWriter.write_data = write_data

    assert [wait(pid) for pid in start([(plan, manifest)], 2, slow_disk)] == [0, 0]
    names = sorted(path.name for path in (Path(plan.run_folder) / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004", "step-000006"]
    assert [row["step"] for row in metrics_of(plan)] == list(range(1, 7))


def test_a_rank_that_is_killed_while_it_writes_leaves_nothing_torn(shared):
    changes = {"steps": 6, "every": 2, "ema": Ema(decay=0.9, device="cpu", every=1)}
    plan, _, manifest = shared("sana", "full", 2, 1, "whole", **changes)
    killed = evolve(plan, name="killed", run_folder=f"{plan.run_folder}-killed")

    def dies(rank: int) -> None:
        stock, saves = FileSystemWriter.write_data, []

        def write_data(self, *arguments):
            saves.append(1)
            if rank == 1 and len(saves) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return stock(self, *arguments)

        FileSystemWriter.write_data = write_data

    assert [wait(pid) for pid in start([(plan, manifest)], 2)] == [0, 0]
    began = time.monotonic()
    codes = [wait(pid) for pid in start([(killed, manifest)], 2, dies)]
    assert codes[0] == 3 and codes[1] not in (0, 1, 3) and time.monotonic() - began < 60
    folder = Path(killed.run_folder) / "checkpoints"
    assert [each.name for each in checkpoints.complete(folder)] == ["step-000002"]
    assert [wait(pid) for pid in start([(killed, manifest)], 2)] == [0, 0]
    assert_equal(killed, plan)
