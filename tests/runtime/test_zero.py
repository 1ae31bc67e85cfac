"""Ranks under DeepSpeed train as one process does, save together and go on; on gloo, for real."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file

from compiler.plan import Precision, Sharing
from runtime import checkpoints, zero
from runtime.errors import MachineUnfit, RunFailed
from runtime.events import Silent
from runtime.execute import execute
from runtime.zero_saving import judge
from tests.runtime.plans import PICTURES
from tests.runtime.test_execute import MIXED, metrics_of, wait
from tests.runtime.test_ranks_run import make, place, start
from tests.runtime.test_sharded import begun, drawn, results

__all__ = ["make", "place"]
HERE = importlib.util.find_spec("deepspeed") is not None
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")
real = pytest.mark.skipif(not HERE, reason="needs deepspeed")


def stage(number: int, *, offload: bool = False) -> Sharing:
    return Sharing(strategy="deepspeed", stage=number, offload_optimizer=offload)


@pytest.fixture
def shared(make):
    """As `make`, the plan of several processes being DeepSpeed's."""

    def made(*arguments, sharing, **changes):
        together, alone, manifest = make(*arguments, **{"ema": None, **changes})
        return evolve(together, sharing=sharing), alone, manifest

    return made


def assert_as_alone(together, alone, tolerance: float) -> None:
    """Results differ by `tolerance` of a tensor's largest value; losses and norms by rounding."""
    mine, others = results(together), results(alone)
    assert mine.keys() == others.keys()
    for name, tensor in others.items():
        far = float((mine[name].float() - tensor.float()).abs().max())
        assert far <= tolerance * float(tensor.float().abs().max()), (name, far)
    rows = list(zip(metrics_of(together), metrics_of(alone), strict=True))
    assert [row["step"] for row, _ in rows] == list(range(1, together.steps.total + 1))
    for row, row_b in rows:
        assert row["loss"] == pytest.approx(row_b["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(row_b["grad_norm"], rel=1e-4)
        assert row["samples"] == row_b["samples"]


CASES = [
    ("sd3", "full", 2, stage(1), {"optimizer": "sgd"}),
    ("sana", "lora", 1, stage(2), {"validation": PICTURES}),
    ("sana", "full", 2, stage(2, offload=True), {"optimizer": "sgd"}),
    ("sana", "full", 1, stage(3), {"optimizer": "sgd", "validation": PICTURES}),
    ("sd3", "lora", 2, stage(3, offload=True), {}),
]


@real
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=pytest.mark.slow) if n not in (1, 3) else c
        for n, c in enumerate(CASES)
    ],
)
def test_ranks_under_deepspeed_train_as_one_process_does(shared, case):
    family, method, accumulate, sharing, changes = case
    together, alone, manifest = shared(family, method, 2, accumulate, sharing=sharing, **changes)
    assert [wait(pid) for pid in start([(together, manifest)], 2)] == [0, 0]
    execute(alone, manifest, Silent())
    assert_as_alone(together, alone, 1e-5 if together.optimizer.name == "sgd" else 5e-4)
    assert len(drawn(together)) == len(drawn(alone)) == 3 * bool(together.validation.prompts)
