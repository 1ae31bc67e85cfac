"""Saving while training goes on: what is copied, what waits for what, and where errors come up."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve

from compiler.plan import Checkpoints, Plan
from runtime import checkpoints, saving
from runtime.checkpoints import Snapshot
from runtime.errors import RunFailed
from runtime.execute import execute
from runtime.host_copy import HostCopy
from runtime.saving import Saver, Write
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.run_plan import Interrupting
from tests.runtime.test_checkpoints import snapshot

HOST = torch.device("cpu")
RULES = Checkpoints(every=1, keep=2)
FULL = OSError(28, "No space left on device")
SECONDS = 20.0  # until a test that waits for a thread gives up


def test_a_copy_is_equal_and_apart() -> None:
    tree = {
        "weights": [torch.randn(5, 3), torch.randn(4, 6).bfloat16().t(), torch.zeros(0, 3)],
        "state": {0: {"step": torch.tensor(3.0), "mask": torch.tensor([True, False])}},
        "rest": (torch.arange(7), 0.1, "adamw", None),
    }
    copied = HostCopy(HOST).take(tree)
    kept = [torch.clone(tensor) for tensor in _tensors(tree)]
    for tensor in _tensors(tree):
        tensor.zero_()
    assert copied["rest"][1:] == (0.1, "adamw", None) and isinstance(copied["rest"], tuple)
    for ours, theirs in zip(_tensors(copied), kept, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_a_copy_is_written_alone() -> None:
    """Each tensor is a storage of its own, or a saver would write the whole room for each."""
    copied = HostCopy(HOST).take([torch.randn(100), torch.randn(100_000)])
    file = io.BytesIO()
    torch.save(copied[0], file)
    assert file.tell() < 4000


def test_the_room_is_used_again() -> None:
    room = HostCopy(HOST)
    (first,) = room.take([torch.ones(1000)])
    (second,) = room.take([torch.full((900,), 2.0)])
    assert first.data_ptr() == second.data_ptr() and bool((second == 2).all())
    (third,) = room.take([torch.ones(100_000)])  # a larger one; what is held stays
    assert bool((second == 2).all()) and bool((third == 1).all())


def test_memory_that_can_not_be_locked_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA keeps an error until somebody asks for it: a kernel does, which is there to fail."""
    asked: list[str] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *_: 2,
        cudaHostUnregister=lambda *_: asked.append("unregister"),
    )

    def fails(*_: Any, **__: Any) -> None:
        asked.append("kernel")
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch, "zeros", fails)
    room = HostCopy(torch.device("cuda", 0))
    (copied,) = room.take([torch.ones(10)])
    room.close()
    assert bool((copied == 1).all()) and asked == ["kernel"]


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for item in tree for t in _tensors(item)] if isinstance(tree, list | tuple) else []


class Gate:
    """In the place of `checkpoints.save`: writes once it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: int = -1) -> None:
        self._save, self._fails = checkpoints.save, fails
        self.begun, self.opened = threading.Event(), threading.Event()
        monkeypatch.setattr(saving.checkpoints, "save", self)

    def __call__(self, root: Path, taken: Snapshot) -> Path:
        """See `checkpoints.save`."""
        self.begun.set()
        assert self.opened.wait(SECONDS)
        if taken.step == self._fails:
            raise RunFailed(f"could not save the checkpoint of step {taken.step}: {FULL}")
        return self._save(root, taken)


def writing(root: Path, step: int) -> Write:
    taken = snapshot(step)
    return lambda: checkpoints.save(root, taken)


def test_one_save_is_under_way_and_the_next_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path, RULES, tmp_path / "metrics.jsonl")
    saver.save(1, lambda: writing(tmp_path, 1))
    assert gate.begun.wait(SECONDS)
    assert saver.has(1) and not saver.has(2) and checkpoints.complete(tmp_path) == []
    saver.check()  # does not wait
    threading.Timer(0.1, gate.opened.set).start()
    seen: list[int] = []

    def take() -> Write:
        seen.extend(checkpoints.step_of(each) for each in checkpoints.complete(tmp_path))
        return writing(tmp_path, 2)

    saver.save(2, take)
    assert seen == [1]  # the first was there before the second was copied
    saver.save(3, lambda: writing(tmp_path, 3))
    saver.finish()
    assert [checkpoints.step_of(each) for each in checkpoints.complete(tmp_path)] == [2, 3]


def test_an_error_comes_up_once_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, fails=2)
    gate.opened.set()
    saver = Saver(tmp_path, RULES, tmp_path / "metrics.jsonl")
    saver.save(1, lambda: writing(tmp_path, 1))
    saver.save(2, lambda: writing(tmp_path, 2))
    with pytest.raises(RunFailed, match="No space left"):
        saver.finish()
    saver.check()
    saver.finish()
    assert not saver.has(2)
    assert [checkpoints.step_of(each) for each in checkpoints.complete(tmp_path)] == [1]


@pytest.fixture
def make(tiny_sana: Path, tmp_path: Path) -> Any:
    """A plan of ten steps, a checkpoint after every second."""
    draw_data(tmp_path / "dog")
    return tiny_plan("sana", tiny_sana, tmp_path / "dog", tmp_path / "run", steps=10, every=2)


def steps_of(plan: Plan) -> list[int]:
    found = checkpoints.complete(Path(plan.run_folder) / "checkpoints")
    return [checkpoints.step_of(each) for each in found]


def test_training_goes_on_while_a_checkpoint_is_written(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is written is the state at the step of the save, whatever came after."""
    plan, manifest = make
    gate = Gate(monkeypatch)
    there: list[tuple[int, list[int]]] = []

    class Watching(Interrupting):
        def step(self, metrics: Any) -> None:
            there.append((metrics["step"], steps_of(plan)))
            if metrics["step"] == 4:
                gate.opened.set()

    execute(plan, manifest, Watching("", 0, signal.SIGTERM))
    assert dict(there)[3] == dict(there)[4] == []  # that of step 2 was not there yet
    late = checkpoints.load(Path(plan.run_folder) / "checkpoints" / "step-000002")
    monkeypatch.undo()
    other = evolve(
        plan, run_folder=f"{plan.run_folder}-2", checkpoints=Checkpoints(every=2, keep=0)
    )
    execute(other, manifest, Interrupting("step", 2, signal.SIGTERM))
    early = checkpoints.load(Path(other.run_folder) / "checkpoints" / "step-000002")
    assert early.step == late.step == 2
    for name, tensor in early.weights.items():
        assert torch.equal(tensor, late.weights[name])


def test_a_full_disk_ends_the_run_at_the_next_step(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, manifest = make
    gate = Gate(monkeypatch, fails=4)
    gate.opened.set()
    seen: list[int] = []

    class Watching(Interrupting):
        def step(self, metrics: Any) -> None:
            seen.append(metrics["step"])
            for thread in threading.enumerate():
                if thread.name == "save":
                    thread.join(SECONDS)

    with pytest.raises(RunFailed, match="could not save the checkpoint of step 4"):
        execute(plan, manifest, Watching("", 0, signal.SIGTERM))
    assert seen[-1] == 5 and steps_of(plan) == [2]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_run_that_is_stopped_waits_for_what_is_under_way(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, manifest = make
    gate = Gate(monkeypatch)

    class Stopping(Interrupting):
        def step(self, metrics: Any) -> None:
            if metrics["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Timer(0.2, gate.opened.set).start()

    assert execute(plan, manifest, Stopping("", 0, signal.SIGTERM)).status == "stopped"
    assert steps_of(plan) == [2, 3]
    assert not list(Path(plan.run_folder).rglob(".partial-*"))
