"""The warning about a host that is too small."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve, frozen

from compiler.compile import Compiled
from compiler.machine import Machine
from compiler.memory import Candidate, Simulation
from compiler.plan import Phase
from tests.compiler.recipes import GIB, GPU, MACHINE, RECIPE, FixedMemory, compiled, project
from tuner.elsewhere import elsewhere


@frozen
class Waiting:
    """A memory model by which `name` needs so much of the host."""

    name: str
    host_bytes: int

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`."""
        more = Phase(
            name=self.name,
            device_bytes=GIB,
            host_bytes=self.host_bytes,
            parts={"weights": GIB},
        )
        found = FixedMemory().simulate(candidate)
        return evolve(found, phases=(*(p for p in found.phases if p.name != self.name), more))


def told(tmp_path: Path, model: Waiting, *sets: str, machine: Machine = GPU) -> list[str]:
    path = tmp_path / "recipe.toml"
    if not path.exists():
        path = project(tmp_path, RECIPE)
    found: Compiled = compiled(path, *sets, machine=machine, memory_model=model)
    assert found.plan is not None, found.diagnostics
    said = [each for each in found.diagnostics if each.code == "host-too-small"]
    assert all(each.severity == "warning" for each in said)
    return [f"{each.message}; {each.help}" for each in said]


def test_all_that_there_is_may_be_needed_but_no_more(tmp_path: Path) -> None:
    total = GPU.host_total_bytes
    assert told(tmp_path, Waiting("train", total)) == []
    (said,) = told(tmp_path, Waiting("train", total + 2 * GIB))
    assert "`train` needs 66.0 GiB of host memory, and this machine has 64.0 GiB" in said
    assert "train an adapter" in said  # it trains all weights


@pytest.mark.parametrize(
    ("phase", "sets", "advice"),
    [
        ("train", ["memory.offload.activations=true"], "`memory.offload.activations = false`"),
        ("save", ["train.ema.device=cpu"], '`train.ema.device = "same"`'),
        ("update", ["train.optimizer.name=adamw-offload"], "optimizer that is not in host memory"),
        ("text_encoder", [], "swap space for the time of encoding"),
        ("load", [], "take a machine with more memory"),
    ],
)
def test_it_is_said_what_to_do(tmp_path: Path, phase: str, sets: list[str], advice: str) -> None:
    (said,) = told(tmp_path, Waiting(phase, GPU.host_total_bytes + 1), *sets)
    assert said.startswith(f"`{phase}` needs")
    assert advice in said


def test_a_machine_elsewhere_is_taken_to_have_as_much_as_is_usual(tmp_path: Path) -> None:
    for device, gib in (("12 GiB", 32), ("24 GiB", 48), ("a100-80gb", 158)):
        machine = elsewhere(GPU, device)
        assert told(tmp_path, Waiting("train", gib * GIB), machine=machine) == []
        (said,) = told(tmp_path, Waiting("train", (gib + 1) * GIB), machine=machine)
        assert f"a machine elsewhere is taken to have {gib}." in said


def test_nothing_is_said_of_a_device_that_is_not_known(tmp_path: Path) -> None:
    model = Waiting("train", 10**15)
    assert told(tmp_path, model, "launch.device=cuda", machine=MACHINE) == []


def test_a_processor_has_both_in_host_memory(tmp_path: Path) -> None:
    small = evolve(MACHINE, host_total_bytes=12 * GIB)  # 8 GiB are trained with
    assert told(tmp_path, Waiting("save", 11 * GIB), machine=small) == []
    (said,) = told(tmp_path, Waiting("save", 12 * GIB), machine=small)
    assert "`save` needs 13.0 GiB" in said


@pytest.mark.parametrize(("adapter", "warned"), [("lora", True), ("", False)])
def test_each_process_has_what_waits(tmp_path: Path, adapter: str, warned: bool) -> None:
    """Of a model that is trained whole, most of it is the first one's alone."""
    more = f'\n[adapter]\nkind = "{adapter}"\n' if adapter else ""
    project(tmp_path, RECIPE + more)
    half = Waiting("train", GPU.host_total_bytes // 2)
    assert told(tmp_path, half, "launch.devices=2") == []
    said = told(tmp_path, half, "launch.devices=3")
    assert bool(said) is warned
    assert all("of host memory for 3 processes" in each for each in said)
