"""Ranks under DeepSpeed train as one process does, save together and go on; on gloo, for real."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file

from compiler.plan import Sharing
from runtime import checkpoints, step, zero
from runtime.errors import MachineUnfit, RunFailed
from runtime.events import Silent
from runtime.execute import execute
from runtime.zero_saving import judge
from tests.runtime.plans import PICTURES
from tests.runtime.test_ranks_run import make, place, start
from tests.runtime.test_sharded import begun, drawn, results
from tests.runtime.whole_runs import MIXED, metrics_of, wait

__all__ = ["make", "place"]
HERE = importlib.util.find_spec("deepspeed") is not None
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")
LATE = ("accelerate", "deepspeed", "deepspeed.ops", "deepspeed.utils")  # loaded by a run
real = pytest.mark.skipif(not HERE, reason="needs deepspeed")


def stage(number: int, *, offload: bool = False) -> Sharing:
    return Sharing(strategy="deepspeed", stage=number, offload_optimizer=offload)


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """The ranks are forks of this process: none has to load DeepSpeed by itself."""
    if HERE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DS_ACCELERATOR", "cpu")
            for name in LATE:
                importlib.import_module(name)


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
    ("sana", "full", 1, stage(3), {"optimizer": "sgd", "validation": PICTURES}),
    ("sd3", "full", 2, stage(1), {"optimizer": "sgd"}),
    ("sana", "lora", 1, stage(2), {"validation": PICTURES}),
    ("sana", "full", 2, stage(2, offload=True), {"optimizer": "sgd"}),
    ("sd3", "lora", 2, stage(3, offload=True), {}),
]


@real
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_under_deepspeed_train_as_one_process_does(shared, case):
    family, method, accumulate, sharing, changes = case
    together, alone, manifest = shared(family, method, 2, accumulate, sharing=sharing, **changes)
    assert [wait(pid) for pid in start([(together, manifest)], 2)] == [0, 0]
    execute(alone, manifest, Silent())
    assert_as_alone(together, alone, 1e-5 if together.optimizer.name == "sgd" else 5e-4)
    assert len(drawn(together)) == len(drawn(alone)) == 3 * bool(together.validation.prompts)


@real
@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_masters_are_float32_and_what_computes_is_bfloat16(shared, number):
    """The steps of one process with float32 masters, up to bfloat16's rounding of gradients."""
    given = {"precision": MIXED, "optimizer": "sgd", "lr": 1e-2}
    together, alone, manifest = shared("sd3", "full", 2, 2, sharing=stage(number), **given)
    assert [wait(pid) for pid in start([(together, manifest)], 2)] == [0, 0]
    execute(alone, manifest, Silent())
    weights, others, initial = (
        checkpoints.load(checkpoints.latest(Path(plan.run_folder) / "checkpoints")).weights
        if plan
        else load_file(Path(alone.model.base) / "transformer/diffusion_pytorch_model.safetensors")
        for plan in (together, alone, None)
    )
    moved = sum(float((others[n] - initial[n]).square().sum()) for n in others)
    apart = sum(float((others[n] - weights[n]).square().sum()) for n in others)
    assert apart < (0.02**2) * moved, "of the way that the weights went"
    for row, row_b in zip(metrics_of(together), metrics_of(alone), strict=True):
        assert row["loss"] == pytest.approx(row_b["loss"], rel=1e-2)


@real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "sharing", "precision"),
    [
        ("sd3", "full", stage(1), MIXED),
        ("sana", "lora", stage(2), None),
        ("sana", "full", stage(3, offload=True), MIXED),
    ],
)
def test_it_goes_on_bit_for_bit(shared, family, method, sharing, precision):
    """In bfloat16 too, where float32 weights are what is saved and trained."""
    changes = {"precision": precision} if precision else {}
    plan, _, manifest = shared(family, method, 2, 1, sharing=sharing, every=3, **changes)
    again = evolve(plan, name="again", run_folder=f"{plan.run_folder}-again")
    assert [wait(pid) for pid in start([(plan, manifest)], 2)] == [0, 0]
    begun(again, plan, "step-000003")
    assert [wait(pid) for pid in start([(again, manifest)], 2)] == [0, 0]
    whole, mine = results(plan), results(again)
    assert whole.keys() == mine.keys()
    for name, tensor in whole.items():
        assert tensor.dtype == torch.float32 and torch.equal(mine[name], tensor), name
    for row, row_b in zip(metrics_of(again), metrics_of(plan), strict=True):
        assert (row["step"], row["loss"]) == (row_b["step"], row_b["loss"])

    saved = Path(plan.run_folder) / "checkpoints" / "step-000003"
    weights = checkpoints.load(saved).weights
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    last = checkpoints.load(saved.with_name("step-000005")).weights
    assert last.keys() == weights.keys()
    assert any(not torch.equal(last[name], tensor) for name, tensor in weights.items())


@real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharing", "spoilt", "precision"),
    [
        (stage(1), "loss", None),
        (stage(2), "gradient", None),
        (stage(2, offload=True), "loss", MIXED),
        (stage(3), "loss", MIXED),
        (stage(3, offload=True), "gradient", None),
    ],
)
def test_a_loss_or_gradient_that_is_no_number_changes_nothing(shared, sharing, spoilt, precision):
    """In one rank; the loss is infinite while its gradients are finite."""
    changes = {"precision": precision} if precision else {}
    plan, _, manifest = shared("sana", "lora", 2, 1, sharing=sharing, every=1, keep=5, **changes)
    plan = evolve(plan, guard=evolve(plan.guard, skip=1))

    def spoil(rank: int) -> None:
        stock, losses, calls = zero.Zero._backward, step.forward_losses, []

        def backward(self, loss):
            calls.append(1)
            stock(self, loss * float("nan") if rank == 1 and len(calls) == 2 else loss)

        def infinite(*arguments):
            calls.append(1)
            found = losses(*arguments)
            return found + float("inf") if rank == 1 and len(calls) == 2 else found

        if spoilt == "gradient":
            zero.Zero._backward = backward
        else:
            step.forward_losses = infinite

    assert [wait(pid) for pid in start([(plan, manifest)], 2, spoil)] == [0, 0]
    assert [row["step"] for row in metrics_of(plan) if "grad_norm" not in row] == [2]
    first, second, third = (
        checkpoints.load(Path(plan.run_folder) / f"checkpoints/step-00000{n}").weights
        for n in (1, 2, 3)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def written(folder: Path, sharing: Sharing | None, ranks: int) -> Path:
    """What `judge` reads of a checkpoint."""
    (folder / "zero").mkdir(parents=True)
    if sharing is not None:
        facts = {"stage": sharing.stage, "ranks": ranks, "offload": sharing.offload_optimizer}
        (folder / "zero" / "ranks.json").write_text(json.dumps(facts))
    return folder


def test_only_those_that_wrote_a_checkpoint_go_on_from_it(make, tmp_path):
    plan, alone, _ = make("sana", "lora", 2, 1)
    two = evolve(plan, sharing=stage(2))
    kept = written(tmp_path / "two", stage(2), 2)
    plain = written(tmp_path / "plain", None, 2)
    judge(kept, two)
    for fits in (plan, alone):
        judge(plain, fits)
    more = evolve(two, steps=evolve(two.steps, ranks=3))
    for folder, other in (
        (kept, evolve(plan, sharing=stage(3))),
        (kept, evolve(plan, sharing=stage(2, offload=True))),
        (kept, more),
        (kept, plan),
        (kept, alone),
        (plain, two),
    ):
        with pytest.raises(RunFailed, match="was written"):
            judge(folder, other)
    with pytest.raises(RunFailed) as failed:
        judge(kept, more)
    assert "by 2 devices under DeepSpeed's stage 2; this run goes on by 3" in failed.value.message


def test_a_missing_package_is_said_before_anything_else(make, monkeypatch):
    plan, _, _ = make("sana", "lora", 2, 1)
    stock = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else stock(name)
    )
    zero.check_zero(plan)
    with pytest.raises(MachineUnfit) as unfit:
        zero.check_zero(evolve(plan, sharing=stage(2)))
    assert unfit.value.help == 'pip install "tuner[deepspeed]"'
