"""What runs needed beside what was planned, kept for the next plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from compiler.memory import Candidate, Simulation
from compiler.plan import Phase
from runtime.measured import planned_peaks
from runtime.memory.corrections import CorrectedMemoryModel, Correction, read, remember
from runtime.memory.simulate import CUBLAS_WORKSPACE, CUDA_CONTEXT
from runtime.memory.tracker import rounded
from tests.compiler.recipes import GPU
from tests.runtime.memory_cases import small
from tests.tuner.examples import sd35_large_lora

MIB = 2**20


class Fixed:
    """100 MiB in each phase."""

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`."""
        phases = [
            Phase(name=name, device_bytes=100 * MIB, host_bytes=0, parts={"weights": 100 * MIB})
            for name in ("load", "train", "update", "validate")
        ]
        return Simulation(
            phases=tuple(phases),
            parameters=1,
            trainable=1,
            adapted_modules=1,
            flops=1,
            seconds=0.0,
        )


def row(planned: int, measured: int, correction: int = 0) -> dict[str, object]:
    parts = {"weights": planned - correction, **({"correction": correction} if correction else {})}
    return {"planned_bytes": planned, "measured_bytes": measured, "planned_parts": parts}


def test_the_next_plan_is_corrected(tmp_path: Path) -> None:
    plan, path = sd35_large_lora(), tmp_path / "cache" / "memory.json"
    memory = {"train": row(1000 * MIB, 1030 * MIB), "validate": row(900 * MIB, 880 * MIB)}
    assert remember(path, plan, GPU, memory)
    candidate = small("sd3", rank=4, device="cuda", compute="bfloat16")
    found = CorrectedMemoryModel(Fixed(), read(path), GPU).simulate(candidate)
    peaks = {phase.name: phase.device_bytes for phase in found.phases}
    assert peaks == {
        "load": 100 * MIB, "train": 130 * MIB, "update": 130 * MIB, "validate": 80 * MIB
    }  # fmt: skip
    assert all(sum(phase.parts.values()) == phase.device_bytes for phase in found.phases)
    for other in (
        small("sana", rank=4, device="cuda", compute="bfloat16"),
        small("sd3", device="cuda", compute="bfloat16"),
        small("sd3", rank=4, device="cpu", compute="bfloat16"),
    ):
        again = CorrectedMemoryModel(Fixed(), read(path), GPU).simulate(other)
        assert {phase.device_bytes for phase in again.phases} == {100 * MIB}
    named = evolve(GPU, device_name="another")
    again = CorrectedMemoryModel(Fixed(), read(path), named).simulate(candidate)
    assert {phase.device_bytes for phase in again.phases} == {100 * MIB}


def test_a_fine_tune_of_all_weights_is_no_full_matrix_adapter(tmp_path: Path) -> None:
    plan, path = sd35_large_lora(), tmp_path / "memory.json"
    assert remember(path, evolve(plan, adapter=None), GPU, {"train": row(1000 * MIB, 1030 * MIB)})
    candidate = small("sd3", rank=4, device="cuda", compute="bfloat16")
    assert candidate.adapter is not None
    adapted = evolve(candidate, adapter=evolve(candidate.adapter, kind="full"))
    for given, bytes_ in ((evolve(candidate, adapter=None), 130 * MIB), (adapted, 100 * MIB)):
        found = CorrectedMemoryModel(Fixed(), read(path), GPU).simulate(given)
        assert {p.name: p.device_bytes for p in found.phases}["train"] == bytes_


def test_corrections_add_up_instead_of_swinging(tmp_path: Path) -> None:
    """A second run, planned with the first one's correction, measures the same."""
    plan, path = sd35_large_lora(), tmp_path / "memory.json"
    remember(path, plan, GPU, {"train": row(1000 * MIB, 1030 * MIB)})
    remember(path, plan, GPU, {"train": row(1030 * MIB, 1030 * MIB, correction=30 * MIB)})
    (found,) = read(path).values()
    assert found == Correction(bytes=30 * MIB, runs=2)


def test_on_the_processor_passes_and_update_are_corrected_apart(tmp_path: Path) -> None:
    """Where they are measured apart."""
    plan, path = evolve(sd35_large_lora(), device="cpu"), tmp_path / "memory.json"
    remember(path, plan, GPU, {"train": row(10 * MIB, 40 * MIB), "update": row(9 * MIB, 5 * MIB)})
    candidate = small("sd3", rank=4, device="cpu", compute="bfloat16")
    found = CorrectedMemoryModel(Fixed(), read(path), GPU).simulate(candidate)
    peaks = {phase.name: phase.device_bytes // MIB for phase in found.phases}
    assert peaks == {"load": 100, "train": 130, "update": 96, "validate": 100}


def test_nothing_measured_nothing_kept(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    assert not remember(path, sd35_large_lora(), GPU, {"train": {"planned_bytes": 5}})
    assert not path.exists() and read(path) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1, "phases": 3}'])
def test_a_damaged_file_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "memory.json"
    path.write_text(text)
    assert read(path) == {}


def test_what_is_compared_with_the_allocator() -> None:
    """A step as a whole, and without the device's context."""
    context = rounded(CUDA_CONTEXT) + CUBLAS_WORKSPACE
    plan = sd35_large_lora()

    def phase(name: str, tensors: int) -> Phase:
        parts = {"weights": tensors, "context": context}
        return Phase(name=name, device_bytes=tensors + context, host_bytes=0, parts=parts)

    memory = evolve(plan.memory, phases=(phase("train", 500), phase("update", 600)))
    found = planned_peaks(evolve(plan, memory=memory))
    assert found == {"train": {"weights": 600, "workspace of cuBLAS": CUBLAS_WORKSPACE}}
