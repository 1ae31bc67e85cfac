"""What a step in the middle of a run finds, and that no later one takes more."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from compiler.memory import Candidate
from compiler.optimizers import OPTIMIZERS
from compiler.plan import Optimizer
from runtime.memory.primed import prime
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.tracker import Tracker
from runtime.optimizers import make_optimizer
from runtime.step import gradient_norm, update
from tests.runtime.memory_cases import small

SHAPES = ((64, 64), (32, 128), (64,), (16, 16))
STEPS = 24
THERE = [
    name
    for name, facts in OPTIMIZERS.items()
    if "cpu" in facts.devices
    and not facts.compiled
    and all(importlib.util.find_spec(p) for p in [facts.path.split(".")[0]])
]


@pytest.mark.parametrize("name", THERE)
def test_no_later_update_takes_more(name: str) -> None:
    facts = OPTIMIZERS[name]
    chosen = Optimizer(name=name, lr=1e-3, arguments=dict(facts.defaults), fused=False)
    tracker, peaks = Tracker({"cpu"}), []
    with tracker:
        trained = {f"p{n}": nn.Parameter(torch.ones(s) * 0.02) for n, s in enumerate(SHAPES)}
        optimizer = make_optimizer(chosen, list(trained.items()), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            for parameter in trained.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            tracker.reset_peak()
            update(optimizer, gradient_norm(trained.values()), 1.0)
            peaks.append(tracker.peak)
    counted = facts.late  # the update after so many
    assert max(peaks[counted:]) == peaks[counted]


@pytest.mark.parametrize("name", ["adamw", "soap", "came", "adafactor", "radam", "prodigy", "muon"])
@pytest.mark.parametrize("rank", [0, 4])
def test_states_are_like_those_of_a_whole_update(name: str, rank: int) -> None:
    """Made for one parameter of each form and copied, against a second update that makes none."""
    step = small("sana", rank=rank, optimizer=name, fused=False)
    tracker = RuntimeMemoryModel().tracker("cpu")
    with tracker:
        trained = parameters(step)
        optimizer = prime(step, trained, tracker)
        before = tracker.categories()
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        update(optimizer, gradient_norm(trained.values()), 1.0)
        assert tracker.categories() == before
    storages = [t.untyped_storage()._cdata for t in tensors_of(list(optimizer.state.values()))]
    assert storages and len(set(storages)) == len(storages)


def parameters(step: Candidate) -> dict[str, nn.Parameter]:
    shapes = [(32, 16), (32, 16), (16, 32), (16,), (16,), (32, 16)]
    device = torch.device("meta")
    return {f"p{n}": nn.Parameter(torch.zeros(s, device=device)) for n, s in enumerate(shapes)}


def tensors_of(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for each in value for t in tensors_of(each)] if isinstance(value, list) else []
