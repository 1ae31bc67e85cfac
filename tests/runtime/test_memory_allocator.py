"""The GPU benchmark, with the processor's tensors behind a fake of the device's allocator."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.memory.allocator import ALLOCATED, AllocatorTracker
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.step import run_step
from runtime.memory.tracker import Tracker
from tests.runtime.memory_cases import small

CPU = torch.device("cpu")
SLACK = 1000  # bytes that the fake keeps for later
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_memory.py"


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """What `torch.cuda` is asked, answered by a tracker of real tensors."""
    tracker = Tracker({"cpu"})
    answers: dict[str, Any] = {
        "synchronize": lambda _: None,
        "memory_allocated": lambda _: tracker.current,
        "max_memory_allocated": lambda _: tracker.peak,
        "max_memory_reserved": lambda _: tracker.peak + SLACK,
        "reset_peak_memory_stats": lambda _: tracker.reset_peak(),
        "mem_get_info": lambda _: (10**12, 10**12),
        "get_device_capability": lambda _: (9, 0),
        "is_available": lambda: True,
    }
    # The host is the device here: what is said to be on the host has to be left out.
    monkeypatch.setattr(AllocatorTracker, "exclude", lambda _, tensors: tracker.exclude(tensors))
    monkeypatch.setattr(AllocatorTracker, "elsewhere", lambda _: tracker.elsewhere())
    answers["empty_cache"] = lambda: None
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
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


PHASES = ["text_encoder", "latents", "load", "train", "update", "validate"]


@pytest.fixture
def tiny(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A case that the processor can measure; the benchmark's only one."""
    case = script.Case("tiny", small("sana", rank=4, pictures=((128, 128),)))
    monkeypatch.setattr(script, "cases", lambda: iter([case]))
    return case


def test_its_table(script: ModuleType, allocator: Tracker, tiny: Any) -> None:
    with allocator:
        found = list(script.rows("", CPU))
    assert [row.phase for row in found] == PHASES
    assert all(row.planned == row.allocated > 0 and not row.why for row in found)
    assert all(row.reserved == row.allocated + SLACK for row in found if row.phase != "load")
    train = next(row for row in found if row.phase == "train")
    huge = script.Row("huge", "-", 10**12, why="left out: 1.0 MB are free")
    text = script.table([*found, huge], {"device": "a fake"})
    assert (
        "- device: a fake\n- 6 phases of 1 configurations: median error 0.00%, worst 0.00%" in text
    )
    assert "- goal (median below 1.5%, worst below 3%): met" in text
    assert f"most {SLACK / train.allocated:.2%}" in text
    assert "- not measured: 1 configurations (huge)" in text
    assert "| huge | - | 1,000,000.0 | | left out: 1.0 MB are free | |" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {7}


@pytest.mark.parametrize(
    ("errors", "word"),
    [
        ((0.01, 0.014, 0.029), "met"),
        ((0.01, 0.016, 0.02), "not met"),
        ((0.0, 0.0, -0.04), "not met"),
    ],
)
def test_its_verdict_is_of_what_was_measured(
    script: ModuleType, errors: tuple[float, ...], word: str
) -> None:
    rows = [script.Row("a", "train", round(1000 * (1 + e)), 1000, 1100) for e in errors]
    rows.append(script.Row("b", "-", 5000, why="failed: out of memory"))
    assert any(line.endswith(f"worst below 3%): {word}") for line in script.verdict(rows))
    assert not any("goal" in line for line in script.verdict(rows[-1:]))


def test_one_that_fails_or_is_too_large_takes_no_other_with_it(
    script: ModuleType, allocator: Tracker, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had measured before stays, and what it held is let go."""
    real, calls = script.run_step, []

    def run_step(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory | tried\nmore")
        if len(calls) == 3:
            raise ValueError("a bug")
        return real(*arguments)

    free = iter([10**12] * 3 + [1000] + [10**12])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free), 10**12))
    monkeypatch.setattr(script, "run_step", run_step)
    names = ["whole", "no memory", "broken", "too large", "last"]
    cases = [script.Case(name, tiny.candidate) for name in names]
    monkeypatch.setattr(script, "cases", lambda: iter(cases))
    with allocator:
        found = list(script.rows("", CPU))
    by_name = {name: [row for row in found if row.name == name] for name in names}
    assert [row.phase for row in by_name["whole"]] == PHASES
    assert [row.phase for row in by_name["last"]] == PHASES
    assert [row.phase for row in by_name["no memory"]] == [*PHASES[:2], "-"]
    (*_, lost), (*_, bug), (large,) = (by_name[name] for name in names[1:4])
    peak = max(row.planned for row in by_name["whole"])
    assert lost.planned == bug.planned == large.planned == peak
    start = "failed: out of memory, where 1,000,000.0 MB were free: CUDA out of memory / tried"
    assert lost.why == start
    assert bug.why.startswith("failed: ValueError,") and bug.why.endswith(": a bug")
    assert large.why == "left out: 0.0 MB are free"


def test_what_is_measured_is_written_at_once(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Ended(BaseException):
        """As a process that is killed."""

    def rows(only: str, device: torch.device) -> Any:
        yield script.Row("a", "train", 100, 100, 120)
        yield script.Row("b", "-", 100, why="failed: out of memory")
        if only == "a killed":
            raise Ended

    monkeypatch.setattr(script, "rows", rows)
    monkeypatch.setattr(script, "look", lambda: SimpleNamespace(device_name="A Fake"))
    monkeypatch.setattr(script, "cuda_devices", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script, "claimed", lambda device: device)
    given = ["gpu_memory.py", "--out", str(tmp_path / "made")]
    monkeypatch.setattr("sys.argv", [*given, "--only", "a killed"])
    with pytest.raises(Ended):
        script.main()
    text = (tmp_path / "made" / "gpu-memory-a-fake-a-killed.md").read_text()
    assert "| a | train |" in text and "failed: out of memory" in text
    monkeypatch.setattr("sys.argv", given)
    assert script.main() == script.FAILED
    assert (tmp_path / "made" / "gpu-memory-a-fake.md").exists()
