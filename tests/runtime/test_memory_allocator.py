"""The GPU benchmark, with the processor's tensors behind a fake of the device's allocator."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from runtime.memory.allocator import ALLOCATED, AllocatorTracker
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.step import run_step
from runtime.memory.tracker import Tracker
from tests.runtime.memory_cases import small

CPU = torch.device("cpu")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_memory.py"


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """What `torch.cuda` is asked, answered by a tracker of real tensors."""
    tracker = Tracker({"cpu"})
    answers: dict[str, Any] = {
        "synchronize": lambda _: None,
        "memory_allocated": lambda _: tracker.current,
        "max_memory_allocated": lambda _: tracker.peak,
        "reset_peak_memory_stats": lambda _: tracker.reset_peak(),
        "mem_get_info": lambda _: (10**12, 10**12),
        "is_available": lambda: True,
    }
    # The host is the device here: what is said to be on the host has to be left out.
    monkeypatch.setattr(AllocatorTracker, "exclude", lambda _, tensors: tracker.exclude(tensors))
    monkeypatch.setattr(AllocatorTracker, "elsewhere", lambda _: tracker.elsewhere())
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return tracker


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_memory", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_memory"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_an_allocator_s_peaks_are_the_simulated_ones(allocator: Tracker, rank: int) -> None:
    step = small("sana", rank=rank, compute="bfloat16", checkpointing=1, pictures=((128, 128),))
    watched: Any = AllocatorTracker(CPU)
    with allocator:
        found = run_step(step, step.shapes[0], CPU, watched)
    planned = RuntimeMemoryModel().course(step, step.shapes[0])
    for name in ("load", "train_peak", "update_peak", "validate_peak"):
        ours, real = getattr(planned, name), getattr(found, name)
        assert real == {ALLOCATED: sum(ours.values())}, name


def test_the_benchmark_has_enough_cases(script: ModuleType) -> None:
    cases = list(script.cases())
    assert len(cases) >= 20 and len({case.name for case in cases}) == len(cases)
    kinds = {part.quantize for c in cases for part in c.candidate.model.components}
    assert kinds == {"none", "int8", "nf4"}
    assert {1, 2, 4, 6, 8} <= {batch for c in cases for *_, batch in c.candidate.shapes}
    assert {512, 1024, 2048} == {width for c in cases for width, *_ in c.candidate.shapes}


def test_its_table(
    script: ModuleType, allocator: Tracker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = script.Case("tiny", small("sana", rank=4, pictures=((128, 128),)))
    monkeypatch.setattr(script, "cases", lambda: iter([case]))
    monkeypatch.setattr(script, "rounded", lambda _: 0)  # no context on the processor
    with allocator:
        found = list(script.rows("", CPU))
    names = [phase for _, phase, _, _ in found]
    assert names == ["text_encoder", "latents", "load", "train", "update", "validate"]
    assert all(planned == real > 0 for _, _, planned, real in found)
    text = script.table([*found, ("huge", "-", 10**12, 0)], {"device": "a fake"})
    assert "- 6 phases of 1 configurations: median error 0.00%, worst 0.00%" in text
    assert "| huge | - | 1,000,000.0 | 0.0 | needs more than is free |" in text
