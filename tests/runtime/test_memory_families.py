"""Every family's step, encoders and pictures: simulated as measured, byte for byte.

The first two families have more cases, in `test_memory_exact`.
"""

from __future__ import annotations

import pytest
import torch

from compiler.families import FAMILIES
from runtime.families import family_of
from runtime.memory import phases
from runtime.memory.pretend import as_on
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.step import META, run_step
from runtime.memory.tracker import Tracker
from tests.runtime.memory_cases import small

MODEL, CPU = RuntimeMemoryModel(), torch.device("cpu")
LATER = sorted(set(FAMILIES) - {"sana", "sd3"})


@pytest.mark.parametrize("family", LATER)
@pytest.mark.parametrize(
    ("rank", "checkpointing", "compute"),
    [
        (4, 0, "float32"),
        (4, 1, "bfloat16"),
        (4, 2, "bfloat16"),
        (0, 1, "float32"),
    ],
)
def test_steps(family: str, rank: int, checkpointing: int, compute: str) -> None:
    pictures = ((128, 128),) if checkpointing < 2 else ()
    step = small(family, rank=rank, checkpointing=checkpointing, compute=compute, pictures=pictures)
    simulated = MODEL.course(step, step.shapes[0])
    measured = run_step(step, step.shapes[0], CPU, Tracker({"cpu"}))
    for phase in ("load", "train_peak", "update_peak", "save", "validate_peak"):
        assert getattr(simulated, phase) == getattr(measured, phase), phase
    assert simulated.peak == measured.peak > sum(measured.load.values())


@pytest.mark.parametrize("family", LATER)
def test_encoders(family: str) -> None:
    step, run, size = small(family), family_of(family), (192, 128)
    for encoder in run.card.text_encoders:
        with as_on("cpu"):
            simulated = phases.run_text(step, run, encoder, META, MODEL.tracker("cpu"))
        assert simulated == phases.run_text(step, run, encoder, CPU, Tracker({"cpu"})), encoder
    with as_on("cpu"):
        simulated = phases.run_latents(step, run, size, META, MODEL.tracker("cpu"))
    assert simulated == phases.run_latents(step, run, size, CPU, Tracker({"cpu"}))
