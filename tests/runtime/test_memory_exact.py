"""The simulation on meta tensors against the same step on real ones, byte for byte."""

from __future__ import annotations

import pytest
import torch

from compiler.memory import Candidate
from runtime.memory.simulate import RuntimeMemoryModel, Trace, run_step
from runtime.memory.tracker import Tracker
from tests.runtime.memory_cases import small

MODEL = RuntimeMemoryModel()


def real(step: Candidate) -> Trace:
    """The first bucket's step on CPU tensors."""
    return run_step(step, step.shapes[0], torch.device("cpu"), Tracker({"cpu"}))


def check(step: Candidate) -> None:
    simulated, measured = MODEL.trace(step, step.shapes[0]), real(step)
    assert simulated.load == measured.load
    assert simulated.train == measured.train
    assert simulated.peak == measured.peak == sum(measured.train.values())


@pytest.mark.parametrize("family", ["sana", "sd3"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [0, 1, 2])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_peak(family: str, rank: int, checkpointing: int, compute: str) -> None:
    check(small(family, rank=rank, checkpointing=checkpointing, compute=compute))


@pytest.mark.parametrize("family", ["sana", "sd3"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_float32_masters(family: str, rank: int) -> None:
    check(small(family, rank=rank, compute="bfloat16", trained="float32", checkpointing=1))


@pytest.mark.parametrize("family", ["sana", "sd3"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "radam", "sgd"])
def test_optimizers_without_fused_kernel(family: str, optimizer: str) -> None:
    check(small(family, optimizer=optimizer, fused=False, checkpointing=1))


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_accumulation_average_and_dropout(family: str) -> None:
    check(small(family, rank=4, dropout=0.1, accumulate=3, ema=True, max_grad_norm=0.0))


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_wide_picture(family: str) -> None:
    check(small(family, shapes=((320, 128, 3),), compute="bfloat16"))
