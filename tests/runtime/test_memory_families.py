"""Every family's step, encoders and pictures: simulated as measured, byte for byte.

The first two families have more cases, in `test_memory_exact`. All families x methods x intervals x
number formats, with all optimizers and quantisers, are where TUNER_WHOLE_MATRIX is set: `just
test-matrix`.
"""

from __future__ import annotations

import importlib.util
import os
from itertools import cycle, product

import pytest
import torch
from attrs import evolve

from compiler.families import FAMILIES
from compiler.memory import Candidate
from compiler.optimizers import OPTIMIZERS
from compiler.plan import Quantisation
from compiler.quantisers import QUANTISERS
from runtime.families import family_of
from runtime.memory import phases
from runtime.memory.pretend import as_on
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.step import META, run_step
from runtime.memory.tracker import Tracker
from tests.runtime.memory_cases import small
from tests.runtime.test_memory_exact import runs

MODEL, CPU = RuntimeMemoryModel(), torch.device("cpu")
LATER = sorted(set(FAMILIES) - {"sana", "sd3"})


WHOLE = bool(os.environ.get("TUNER_WHOLE_MATRIX"))
EVERY = list(product((0, 4), (0, 1, 2, 3), ("float32", "bfloat16")))
SOME = [(4, 1, "bfloat16"), (4, 0, "float32"), (0, 1, "float32"), (0, 2, "bfloat16")]
CASES = [  # else each family with an adapter and without, by every second of these
    (family, *case)
    for number, family in enumerate(sorted(FAMILIES) if WHOLE else LATER)
    for case in (EVERY if WHOLE else SOME[number % 2 :: 2])
]


@pytest.mark.parametrize(("family", "rank", "checkpointing", "compute"), CASES)
def test_steps(family: str, rank: int, checkpointing: int, compute: str) -> None:
    pictures = ((128, 128),) if checkpointing < 2 else ()
    check(small(family, rank=rank, checkpointing=checkpointing, compute=compute, pictures=pictures))


def check(step: Candidate) -> None:
    simulated = MODEL.course(step, step.shapes[0])
    measured = run_step(step, step.shapes[0], CPU, Tracker({"cpu"}))
    for phase in ("load", "train_peak", "update_peak", "save", "validate_peak"):
        assert getattr(simulated, phase) == getattr(measured, phase), phase
    assert simulated.peak == measured.peak > sum(measured.load.values())


INSTALLED = [
    name
    for name, row in OPTIMIZERS.items()
    if runs(row) and (not row.package or importlib.util.find_spec(row.path.split(".")[0]))
]
LARGE = ("kolors", "sdxl", "sdxl_refiner")  # UNets like that of "sd", and slower
STOCK = ("sgd", "adamw", "adam", "radam", "adagrad")
KEPT = list(
    product(sorted(FAMILIES), QUANTISERS, ("adamw",))
    if WHOLE
    else zip([n for n in LATER if n not in LARGE], cycle(QUANTISERS), cycle(STOCK), strict=False)
)


@pytest.mark.parametrize(("family", "kind", "optimizer"), KEPT)
def test_quantised(family: str, kind: Quantisation, optimizer: str) -> None:
    """Each family with one quantiser and one optimizer, each of these with several families."""
    step = small(
        family, rank=4, checkpointing=3, compute="bfloat16", optimizer=optimizer, fused=False
    )
    plain = step.model.components
    parts = tuple(evolve(part, quantize=kind) if part.trained else part for part in plain)
    check(evolve(step, model=evolve(step.model, components=parts)))


@pytest.mark.skipif(not WHOLE, reason="TUNER_WHOLE_MATRIX is not set")
@pytest.mark.parametrize(("family", "optimizer"), list(product(sorted(FAMILIES), INSTALLED)))
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_optimizers(family: str, optimizer: str, rank: int, trained: str) -> None:
    if trained not in OPTIMIZERS[optimizer].weights:
        pytest.skip(f"it does not train {trained}")
    settings = {"compute": trained, "trained": trained, "fused": False}
    check(small(family, rank=rank, optimizer=optimizer, **settings))


@pytest.mark.parametrize("family", LATER)
def test_encoders(family: str) -> None:
    step, run, size = small(family), family_of(family), (192, 128)
    for encoder in run.card.text_encoders:
        with as_on("cpu"):
            simulated = phases.run_text(step, run, encoder, META, MODEL.tracker("cpu"))
        assert simulated == phases.run_text(step, run, encoder, CPU, Tracker({"cpu"})), encoder
    for count in (1, 3):
        with as_on("cpu"):
            simulated = phases.run_latents(step, run, size, META, MODEL.tracker("cpu"), count)
        assert simulated == phases.run_latents(step, run, size, CPU, Tracker({"cpu"}), count)
