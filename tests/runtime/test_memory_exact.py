"""The simulation on meta tensors against the same step on real ones, byte for byte."""

from __future__ import annotations

import importlib.util

import attrs
import pytest
import torch
from attrs import evolve

from compiler.memory import Candidate
from compiler.optimizers import OPTIMIZERS, OptimizerFacts
from runtime.families import family_of
from runtime.memory import phases
from runtime.memory.pretend import as_on
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.step import META, Course, run_step
from runtime.memory.tracker import Tracker
from tests.runtime.memory_cases import BASES, SMALL, SMALL_PARTS, candidate, known, small

MODEL = RuntimeMemoryModel()


def runs(row: OptimizerFacts) -> bool:
    """Whether the optimizer's own step is what both sides can run, and take memory by."""
    return "cpu" in row.devices and not (row.compiled or row.reads_values or row.host_bytes)


def real(step: Candidate) -> Course:
    """The first bucket's step on CPU tensors."""
    return run_step(step, step.shapes[0], torch.device("cpu"), Tracker({"cpu"}))


def check(step: Candidate) -> None:
    simulated, measured = MODEL.course(step, step.shapes[0]), real(step)
    for phase in ("load", "train_peak", "update_peak", "save", "evaluate_peak", "validate_peak"):
        assert getattr(simulated, phase) == getattr(measured, phase), phase
    assert simulated.peak == measured.peak > sum(measured.load.values())


PAIRS = [  # every two values of these together; all of them are in `test_memory_families`
    (family, (0, 4)[(n + every) % 2], every, ("float32", "bfloat16")[(n + every // 2) % 2])
    for n, family in enumerate(("sana", "sd3"))
    for every in range(4)
]


@pytest.mark.parametrize(("family", "rank", "checkpointing", "compute"), PAIRS)
def test_peak(family: str, rank: int, checkpointing: int, compute: str) -> None:
    check(small(family, rank=rank, checkpointing=checkpointing, compute=compute))


@pytest.mark.parametrize("family", ["sana", "sd3"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_float32_masters(family: str, rank: int) -> None:
    check(small(family, rank=rank, compute="bfloat16", trained="float32", checkpointing=1))


@pytest.mark.parametrize("optimizer", [n for n, row in OPTIMIZERS.items() if runs(row)])
@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_optimizers(optimizer: str, trained: str) -> None:
    row = OPTIMIZERS[optimizer]
    if row.package and importlib.util.find_spec(row.path.split(".")[0]) is None:
        pytest.skip(f"{row.package} is not installed")
    if trained not in row.weights:
        pytest.skip(f"it does not train {trained}")
    shape = {**SMALL["sd3"], "num_layers": 2}  # what optimizers hold does not depend on the depth
    model = known(BASES["sd3"], SMALL_PARTS["sd3"], **shape)
    given = {"compute": trained, "trained": trained, "optimizer": optimizer, "fused": False}
    check(candidate(model, rank=4, tokens=32, shapes=((128, 128, 2),), device="cpu", **given))


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_accumulation_average_and_dropout(family: str) -> None:
    check(small(family, rank=4, dropout=0.1, accumulate=3, ema=True, max_grad_norm=0.0))


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_masks(family: str) -> None:
    """A mask is one more tensor of each batch, and one more product."""
    plain = small(family, rank=4, checkpointing=1)
    check(attrs.evolve(plain, masked=True))
    more = real(attrs.evolve(plain, masked=True)).peak - real(plain).peak
    assert more >= 0


@pytest.mark.parametrize("family", ["sana", "sd3"])
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_a_target_of_the_base(family: str, checkpointing: int) -> None:
    """One more pass, which saves nothing, and its prediction."""
    plain = small(family, rank=4, checkpointing=checkpointing)
    check(attrs.evolve(plain, keeps_base=True))
    more = real(attrs.evolve(plain, keeps_base=True)).peak - real(plain).peak
    assert more >= 0


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_wide_picture(family: str) -> None:
    check(small(family, shapes=((320, 128, 3),), compute="bfloat16"))


@pytest.mark.parametrize("family", ["sana", "sd3"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_validation(family: str, guidance: float) -> None:
    sizes = ((128, 128), (128, 192), (192, 128))
    step = small(family, rank=4, compute="bfloat16", pictures=sizes, guidance=guidance)
    check(step)
    found = MODEL.course(step, step.shapes[0])
    assert sum(found.validate_peak.values()) > sum(found.save.values())


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_evaluation(family: str) -> None:
    """Passes without gradients, of pictures that may be larger than those that are trained on."""
    plain = small(family, rank=4, compute="bfloat16", checkpointing=1)
    step = attrs.evolve(plain, evaluated=((128, 128, 1), (320, 256, 2)), masked=True)
    check(step)
    found, same = (MODEL.course(s, s.shapes[0]) for s in (step, attrs.evolve(plain, masked=True)))
    assert found.evaluate_peak and found.train_peak == same.train_peak
    larger = attrs.evolve(step, evaluated=((512, 512, 2),))
    more = MODEL.course(larger, larger.shapes[0])
    assert sum(more.evaluate_peak.values()) > sum(found.evaluate_peak.values())


@pytest.mark.parametrize(
    ("family", "encoder"),
    [
        ("sana", "text_encoder"),
        ("sd3", "text_encoder"),
        ("sd3", "text_encoder_2"),
        ("sd3", "text_encoder_3"),
    ],
)
def test_text_encoders(family: str, encoder: str) -> None:
    step, run = small(family), family_of(family)
    with as_on("cpu"):
        simulated = phases.run_text(step, run, encoder, META, MODEL.tracker("cpu"))
    measured = phases.run_text(step, run, encoder, torch.device("cpu"), Tracker({"cpu"}))
    assert simulated == measured
    assert measured["activations"] > 0 < measured["weights"]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_latents(family: str, count: int) -> None:
    step, run, size = small(family), family_of(family), (192, 128)
    with as_on("cpu"):
        simulated = phases.run_latents(step, run, size, META, MODEL.tracker("cpu"), count)
    measured = phases.run_latents(step, run, size, torch.device("cpu"), Tracker({"cpu"}), count)
    assert simulated == measured
    assert measured["activations"] > count * 3 * 192 * 128 * 4


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_tiles(family: str) -> None:
    """Encoding and decoding in tiles: simulated as it is, and less than without."""
    size = (1024, 768)
    whole = small(family, rank=4, pictures=(size,))
    parts = tuple(evolve(p, tiling=p.name == "vae") for p in whole.model.components)
    tiled = evolve(whole, model=evolve(whole.model, components=parts))
    found = {}
    for name, step in (("whole", whole), ("tiled", tiled)):
        with as_on("cpu"):
            found[name] = phases.run_latents(
                step, family_of(family), size, META, MODEL.tracker("cpu")
            )
    real = phases.run_latents(tiled, family_of(family), size, torch.device("cpu"), Tracker({"cpu"}))
    assert found["tiled"] == real
    assert sum(found["tiled"].values()) < 0.6 * sum(found["whole"].values())
    drawn = [MODEL.course(step, step.shapes[0]).validate_peak for step in (whole, tiled)]
    assert sum(drawn[1].values()) < sum(drawn[0].values())
