"""The device that a run takes, and what is said where it can't be had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve

from compiler.plan import Decision, Phase, Plan
from runtime import device
from runtime.errors import MachineUnfit
from runtime.events import Silent
from runtime.execute import execute
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.tiny import make_tiny
from tests.tuner.examples import sd35_large_lora

GIB = 1 << 30
CUDA = torch.device("cuda")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """A CUDA device of 24 GiB, 1 GiB of it free; what its first tensor raises is put in."""
    coming: list[Exception] = []
    stock = torch.empty

    def empty(*arguments: Any, **options: Any) -> torch.Tensor:
        if str(options.get("device", "")).startswith("cuda"):
            raise coming[0]
        return stock(*arguments, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A30")
    return coming


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
    ],
)
def test_a_device_that_others_fill(error: Exception, cuda: list[Exception], tmp_path: Path) -> None:
    """Its first tensor is refused as any later one, with who has the memory."""
    make_tiny("sana", tmp_path / "base")
    data = draw_data(tmp_path / "data")
    plan, manifest = tiny_plan("sana", tmp_path / "base", data, tmp_path / "run", steps=1)
    cuda.append(error)
    with pytest.raises(MachineUnfit) as caught:  # so that no next rung is tried
        execute(evolve(plan, device="cuda"), manifest, Silent())
    first = str(error).splitlines()[0]
    assert caught.value.message == (
        f"cuda has no memory left; the device has 24.0 GiB, of which others hold 23.0 GiB: {first}"
    )
    assert "nvidia-smi" in caught.value.help


def test_a_device_that_others_have_for_themselves(cuda: list[Exception]) -> None:
    """Exclusive mode, and whatever else CUDA says at first."""
    said = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
    cuda.append(torch.AcceleratorError(f"{said}\nCompile with `TORCH_USE_CUDA_DSA`"))
    with pytest.raises(MachineUnfit) as caught:
        device.device_of(evolve(sd35_large_lora(), device="cuda"))
    assert caught.value.message == f"cuda can't be used: {said}"
    assert "nvidia-smi" in caught.value.help


def test_of_several_ranks_each_has_its_own(
    cuda: list[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(device, "claimed", lambda taken: taken)
    plan = evolve(sd35_large_lora(), device="cuda")
    ranks: Any = SimpleNamespace(count=2, local=1, rank=1)
    assert device.device_of(plan, ranks) == torch.device("cuda", 1) == current[0]
    with pytest.raises(MachineUnfit, match="this machine has 2 CUDA devices"):
        device.device_of(plan, SimpleNamespace(count=3, local=2, rank=2))  # type: ignore[arg-type]


def needing(gib: int, source: str) -> Plan:
    plan = sd35_large_lora()
    told = Decision(key="memory.budget", value="80.0 GiB", source=source, why="")
    phase = Phase(name="train", device_bytes=gib * GIB, host_bytes=0, parts={})
    memory = evolve(plan.memory, budget_bytes=80 * GIB, phases=(phase,))
    return evolve(plan, device="cuda", decisions=(told,), memory=memory)


def test_a_plan_for_a_larger_device(cuda: list[Exception]) -> None:
    """Of another machine, or of another device than the one that was asked for its memory."""
    with pytest.raises(MachineUnfit) as caught:
        device.check_size(needing(25, "this machine"), CUDA)
    assert caught.value.message == (
        "the plan needs 25.0 GiB and was made for a device with 80.0 GiB free; cuda (NVIDIA A30) "
        "has 24.0 GiB in all"
    )
    device.check_size(needing(24, "this machine"), CUDA)
    device.check_size(needing(25, "recipe.toml:3"), CUDA)  # a person's own words
    device.check_size(needing(25, "this machine"), torch.device("cpu"))
