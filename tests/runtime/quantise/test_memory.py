"""The memory of steps on quantised bases: simulated against real, and against the table."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve

from compiler.memory import Candidate
from compiler.plan import Quantisation
from compiler.quantisers import QUANTISERS
from runtime.families import family_of
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.step import run_step
from runtime.memory.tracker import Tracker
from runtime.quantise.layers import quantised_layers
from tests.runtime.memory_cases import small

MODEL = RuntimeMemoryModel()


def on_quantised(kind: Quantisation, family: str, compute: str, checkpointing: int) -> Candidate:
    step = small(family, rank=4, compute=compute, checkpointing=checkpointing)
    parts = tuple(
        evolve(part, quantize=kind) if part.name == "transformer" else part
        for part in step.model.components
    )
    return evolve(step, model=evolve(step.model, components=parts))


@pytest.mark.parametrize("kind", QUANTISERS)
@pytest.mark.parametrize(
    ("family", "compute", "checkpointing"), [("sana", "float32", 0), ("sd3", "bfloat16", 1)]
)
def test_simulated_steps_are_real_ones(
    kind: Quantisation, family: str, compute: str, checkpointing: int
) -> None:
    step = on_quantised(kind, family, compute, checkpointing)
    simulated = MODEL.course(step, step.shapes[0])
    real = run_step(step, step.shapes[0], torch.device("cpu"), Tracker({"cpu"}))
    assert simulated.load == real.load
    assert simulated.train_peak == real.train_peak
    assert simulated.peak == real.peak
    model = family_of(family).empty(step.model, "transformer", torch.float32, torch.device("cpu"))
    layers = [layer for _, layer in quantised_layers(model)]
    held = sum(layer.codes.nbytes + layer.scales.nbytes for layer in layers)
    assert held == sum(QUANTISERS[kind].weight_bytes(*layer.shape) for layer in layers) > 0
