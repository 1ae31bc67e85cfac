"""Runs that fail: what was done is kept, nothing is torn, and a sentence says why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors import SafetensorError

from compiler.plan import Checkpoints
from runtime import checkpoints, loop
from runtime.context import result_folder
from runtime.data import cache as caching
from runtime.errors import OutOfMemory, RunFailed
from runtime.execute import execute
from runtime.methods import lora
from runtime.out_of_memory import is_out_of_memory as out_of_memory
from tests.runtime.plans import LORA, PICTURES
from tests.runtime.run_plan import Interrupting, run
from tests.runtime.whole_runs import (
    NEVER,
    assert_equal,
    make,
    place,
)

__all__ = ["make", "place"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and POSIX signals")


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


def test_a_disk_that_is_full_while_pictures_are_encoded_is_said(make, monkeypatch, tmp_path):
    """With what to free and where else the cache may be; the next run goes on from what is kept."""
    plan, manifest = make(name="no-cache")
    plan = evolve(plan, cache_folder=str(tmp_path / "cache"))
    written = caching.Cache._write
    kept = []

    def full(cache, pending):
        if kept:
            raise OSError(28, "No space left on device")
        kept.append(len(pending))
        written(cache, pending)

    monkeypatch.setattr(caching.Cache, "_write", full)
    with pytest.raises(RunFailed, match="No space left on device") as caught:
        execute(plan, manifest, Interrupting(*NEVER))
    assert "MiB are free there, to write" in caught.value.message
    assert "[cache] path" in caught.value.help and "run again" in caught.value.help
    monkeypatch.undo()
    assert kept and run(plan, manifest, Interrupting(*NEVER)) == 0


def test_a_disk_that_is_full_at_the_result_is_said(make, monkeypatch):
    plan, manifest = make(name="no-room")
    save = lora.export

    def full(*given, **more):
        save(*given, **more)  # a part of it is there when the disk is full
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(lora, "export", full)
    with pytest.raises(RunFailed, match="No space left") as caught:
        execute(plan, manifest, Interrupting(*NEVER))
    assert "run again" in caught.value.help and not result_folder(plan).exists()
    monkeypatch.undo()
    assert run(plan, manifest, Interrupting(*NEVER)) == 0 and result_folder(plan).is_dir()


def test_a_run_folder_that_can_not_be_written_is_said(make):
    plan, manifest = make()
    (Path(plan.run_folder) / "run.log").mkdir(parents=True)
    with pytest.raises(RunFailed, match=r"run\.log"):
        execute(plan, manifest, Interrupting(*NEVER))


def test_what_a_person_can_cause_is_said_in_a_sentence(make, place):
    plan, manifest = make()
    for changed, text in (
        (evolve(plan, adapter=evolve(LORA, targets=("nothing",))), "matches none of"),
        (evolve(plan, validation=evolve(PICTURES, score="taste")), "measure `taste`"),
        (evolve(plan, device="cuda"), "plan runs on cuda"),
        (evolve(plan, model=evolve(plan.model, base=str(place / "gone"))), "gone"),
    ):
        folder = Path(plan.run_folder).parent / text.replace(" ", "-").replace("`", "")
        changed = evolve(changed, run_folder=str(folder))
        with pytest.raises(RunFailed, match=text):
            execute(changed, manifest, Interrupting(*NEVER))


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shapes do not fit"))


def test_out_of_memory_in_a_step_keeps_the_last_one(make, monkeypatch):
    """The step before the one that failed is saved, though no checkpoint was due."""
    plan, manifest = make("sana", "lora", steps=6, ema=None)
    plan = evolve(plan, checkpoints=Checkpoints(every=0, keep=0))
    real, calls = loop.micro_step, []

    def too_large(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("tried to allocate 20 MiB")
        return real(*arguments)

    monkeypatch.setattr(loop, "micro_step", too_large)
    with pytest.raises(OutOfMemory, match="cpu ran out of memory in phase train") as caught:
        execute(plan, manifest, Interrupting(*NEVER))
    assert caught.value.phase == "train" and "tried to allocate" in caught.value.message
    saved = checkpoints.latest(Path(plan.run_folder) / "checkpoints")
    assert saved is not None
    assert checkpoints.read_state(saved)["step"] == 3 // plan.steps.accumulate
    monkeypatch.setattr(loop, "micro_step", real)
    execute(plan, manifest, Interrupting(*NEVER))
    whole, _ = make("sana", "lora", "whole", steps=6, ema=None)
    whole = evolve(whole, checkpoints=Checkpoints(every=0, keep=0))
    execute(whole, manifest, Interrupting(*NEVER))
    assert_equal(plan, whole)


def test_out_of_memory_in_an_update_saves_nothing_torn(make, monkeypatch):
    plan, manifest = make("sana", "lora", steps=4, ema=None)
    plan = evolve(plan, checkpoints=Checkpoints(every=0, keep=0))
    real, calls = loop.update, []

    def too_large(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("in the middle")
        real(*arguments)

    monkeypatch.setattr(loop, "update", too_large)
    with pytest.raises(OutOfMemory):
        execute(plan, manifest, Interrupting(*NEVER))
    assert checkpoints.latest(Path(plan.run_folder) / "checkpoints") is None
