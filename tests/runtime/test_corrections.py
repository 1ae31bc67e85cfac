"""What runs needed beside what was planned, kept for the next plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve

from compiler.machine import Machine
from compiler.memory import Candidate, Simulation
from compiler.plan import Layout, Phase, Plan
from runtime.measured import planned_peaks
from runtime.memory.alike import kind_of, kind_of_plan
from runtime.memory.constants import CUBLAS
from runtime.memory.corrections import (
    CorrectedMemoryModel,
    Correction,
    read,
    remember,
    unlikely,
)
from tests.compiler.recipes import GPU, RECIPE, compiled, project
from tests.runtime.memory_cases import known, small
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
    parts = {"weights": planned - correction}
    if correction:
        parts["correction (1 run)"] = correction
    return {"planned_bytes": planned, "measured_bytes": measured, "planned_parts": parts}


def asked(plan: Plan) -> Candidate:
    """What a plan of the same kind asks for, of another size."""
    given = small("sd3", rank=4, device=plan.device, compute="bfloat16", layout=plan.memory.layout)
    return evolve(
        given,
        model=plan.model,
        adapter=plan.adapter and evolve(plan.adapter, rank=4),
        precision=plan.precision,
        optimizer=plan.optimizer,
        ema_on_device=plan.ema is not None and plan.device == "cpu",
        ema_on_host=plan.ema is not None and plan.ema.device == "cpu" != plan.device,
        attention=plan.speed.attention,
    )


def corrected(path: Path, given: Candidate, machine: Machine = GPU) -> dict[str, int]:
    """MiB by phase."""
    found = CorrectedMemoryModel(Fixed(), read(path), machine).simulate(given)
    assert all(sum(phase.parts.values()) == phase.device_bytes for phase in found.phases)
    return {phase.name: phase.device_bytes // MIB for phase in found.phases}


PLAIN = {"load": 100, "train": 100, "update": 100, "validate": 100}


def test_the_next_plan_is_corrected_by_as_much_for_its_size(tmp_path: Path) -> None:
    plan, path = sd35_large_lora(), tmp_path / "cache" / "memory.json"
    memory = {"train": row(1000 * MIB, 1300 * MIB), "validate": row(900 * MIB, 720 * MIB)}
    assert remember(path, plan, GPU, memory)
    expected = {"load": 100, "train": 130, "update": 130, "validate": 80}
    assert corrected(path, asked(plan)) == expected
    found = CorrectedMemoryModel(Fixed(), read(path), GPU).simulate(asked(plan))
    assert {phase.name: phase.parts for phase in found.phases}["train"] == {
        "weights": 100 * MIB, "correction (1 run)": 30 * MIB
    }  # fmt: skip
    assert corrected(path, asked(plan), evolve(GPU, device_name="another")) == PLAIN


def quantised(given: Candidate) -> Candidate:
    trained = given.model.trained_component
    parts = [
        evolve(c, quantize="nf4" if c.name == trained else "none") for c in given.model.components
    ]
    return evolve(given, model=evolve(given.model, components=tuple(parts)))


UNLIKE: dict[str, Callable[[Candidate], Candidate]] = {
    "base": lambda c: evolve(c, model=known("stabilityai/stable-diffusion-3.5-medium")),
    "quantisation": quantised,
    "adapter": lambda c: evolve(c, adapter=None),
    "kind of adapter": lambda c: evolve(c, adapter=c.adapter and evolve(c.adapter, kind="full")),
    "recomputing": lambda c: evolve(c, layout=Layout()),
    "offloading": lambda c: evolve(c, layout=evolve(c.layout, offload_blocks=2)),
    "activations": lambda c: evolve(c, layout=evolve(c.layout, offload_activations=True)),
    "compiled": lambda c: evolve(c, compiled=True),
    "optimizer": lambda c: evolve(c, optimizer=evolve(c.optimizer, name="adamw-8bit")),
    "attention": lambda c: evolve(c, attention="native-math"),
    "memory format": lambda c: evolve(c, channels_last=True),
    "number format": lambda c: evolve(c, precision=evolve(c.precision, compute="float32")),
    "ranks": lambda c: evolve(c, ranks=2),
    "device": lambda c: evolve(c, device="cpu"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_unlike_in_kind_is_not_corrected(name: str, tmp_path: Path) -> None:
    plan, path = sd35_large_lora(), tmp_path / "memory.json"
    remember(path, plan, GPU, {"train": row(1000 * MIB, 1300 * MIB)})
    assert corrected(path, asked(plan))["train"] == 130
    assert corrected(path, UNLIKE[name](asked(plan))) == PLAIN


class Asking(Fixed):
    """Remembers the last candidate."""

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`."""
        self.candidate = candidate
        return super().simulate(candidate)


@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("train.ema.device=cpu", "train.batch_size=1"),
        ("train.ema.device=same", "memory.activation_checkpointing=2", "launch.devices=2"),
        (
            "adapter.kind=lora",
            "adapter.rank=4",
            "memory.offload.blocks=1",
            "speed.compile=regional",
        ),
    ],
)
def test_a_plan_is_of_the_kind_of_what_was_asked_for_it(
    sets: tuple[str, ...], tmp_path: Path
) -> None:
    model, path = Asking(), project(tmp_path, RECIPE)
    found = compiled(path, "memory.budget=none", *sets, machine=GPU, memory_model=model)
    assert found.plan is not None, found.diagnostics
    assert kind_of_plan(found.plan) == kind_of(model.candidate)


def test_corrections_stay_instead_of_swinging(tmp_path: Path) -> None:
    """A second run, planned with the first one's correction, measures the same."""
    plan, path = sd35_large_lora(), tmp_path / "memory.json"
    remember(path, plan, GPU, {"train": row(1000 * MIB, 1030 * MIB)})
    remember(path, plan, GPU, {"train": row(1030 * MIB, 1030 * MIB, correction=30 * MIB)})
    (found,) = read(path).values()
    assert found == Correction(ratio=1.03, runs=2)


def test_what_no_tensor_holds_is_not_in_the_ratio(tmp_path: Path) -> None:
    plan, path = sd35_large_lora(), tmp_path / "memory.json"
    own = row(110 * MIB, 130 * MIB)
    own["planned_parts"] = {"weights": 100 * MIB, CUBLAS: 10 * MIB}
    remember(path, plan, GPU, {"train": own})

    class WithContext(Fixed):
        def simulate(self, candidate: Candidate) -> Simulation:
            """100 MiB of tensors, 400 of what is none."""
            found = super().simulate(candidate)
            parts = {"weights": 100 * MIB, "context": 400 * MIB}
            phases = [evolve(p, device_bytes=500 * MIB, parts=parts) for p in found.phases]
            return evolve(found, phases=tuple(phases))

    found = CorrectedMemoryModel(WithContext(), read(path), GPU).simulate(asked(plan))
    assert {p.name: p.device_bytes // MIB for p in found.phases}["train"] == 520


def test_on_the_processor_passes_and_update_are_corrected_apart(tmp_path: Path) -> None:
    """Where they are measured apart."""
    plan, path = evolve(sd35_large_lora(), device="cpu"), tmp_path / "memory.json"
    remember(path, plan, GPU, {"train": row(10 * MIB, 13 * MIB), "update": row(10 * MIB, 6 * MIB)})
    expected = {"load": 100, "train": 130, "update": 60, "validate": 100}
    assert corrected(path, asked(plan)) == expected


def test_nothing_measured_nothing_kept(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    assert not remember(path, sd35_large_lora(), GPU, {"train": {"planned_bytes": 5}})
    assert not path.exists() and read(path) == {}


@pytest.mark.parametrize("measured", [40, 161, 10**9])
def test_what_is_beyond_belief_corrects_nothing_and_is_told(measured: int, tmp_path: Path) -> None:
    path, memory = tmp_path / "memory.json", {"train": row(100, measured), "load": row(100, 110)}
    assert unlikely(memory) == {"train": measured / 100}
    assert remember(path, sd35_large_lora(), GPU, memory)
    (found,) = read(path).values()
    assert found.ratio == 1.1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 4}',
        '{"format": 3, "phases": 3}',
        '{"format": 2, "phases": {"k": {"ratio": 0.74, "runs": 1}}}',
        '{"format": 1, "phases": {"k": {"bytes": -1000000000000, "runs": 1}}}',
        "[" * 100_000,
        *(
            '{"format": 3, "phases": {"k": ' + each + "}}"
            for each in (
                '{"ratio": -1.0, "runs": 1}',
                '{"ratio": 1e999, "runs": 1}',
                '{"ratio": NaN, "runs": 1}',
                '{"ratio": 1.1, "runs": 1e999}',
                '{"ratio": 1.1, "runs": true}',
                '{"ratio": 1.1, "runs": 0}',
                '{"ratio": "1.1", "runs": 1}',
                "7",
            )
        ),
    ],
)
def test_a_damaged_file_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "memory.json"
    path.write_text(text)
    assert read(path) == {}


def test_a_damaged_row_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    rows = '{"bad": {"ratio": 9.0, "runs": 1}, "good": {"ratio": 1.1, "runs": 3}}'
    path.write_text('{"format": 3, "phases": ' + rows + "}")
    assert read(path) == {"good": Correction(ratio=1.1, runs=3)}


def test_what_is_compared_with_the_allocator() -> None:
    """A step as a whole, and of the constants what goes through the allocator."""
    plan = sd35_large_lora()

    def phase(name: str, tensors: int) -> Phase:
        parts = {"weights": tensors, "pages of the allocator": 22, "buffers of NCCL": 9}
        parts |= {"workspace of cuBLAS": 8, "context": 500}
        return Phase(name=name, device_bytes=sum(parts.values()), host_bytes=0, parts=parts)

    memory = evolve(plan.memory, phases=(phase("train", 500), phase("update", 600)))
    found = planned_peaks(evolve(plan, memory=memory))
    assert found == {"train": {"weights": 600, "workspace of cuBLAS": 8}}
