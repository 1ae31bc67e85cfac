"""Loss scaling: against PyTorch's own scaler, in the loop, and going on from a checkpoint."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import nn

from compiler.plan import Layout, Precision
from runtime import checkpoints
from runtime.build import build
from runtime.errors import RunFailed
from runtime.execute import execute
from runtime.families import family_of
from runtime.guard import Guard
from runtime.loop import one_update
from runtime.scaler import FLOOR, INTERVAL, START, Scaler, scaler_for
from runtime.step import gradient_norm, micro_step
from tests.runtime.memory_cases import small
from tests.runtime.plans import LORA, draw_data, tiny_plan
from tests.runtime.replay import FP32, OBJECTIVE
from tests.runtime.test_loop import Recorder, run, trained_of, weights, window_of
from tests.runtime.test_memory_exact import MODEL, check
from tests.runtime.test_step import batch
from tests.runtime.tiny import make_tiny, tiny_model

CPU = torch.device("cpu")
HALF = Precision(compute="float16", weights="float16", trained="float32", cache="float32")


def test_scale_and_weights_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 updates, some of which overflow; the interval shortened, so that the scale grows too."""
    monkeypatch.setattr("runtime.scaler.INTERVAL", 7)
    own, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    scaler, stock = Scaler(CPU), torch.amp.GradScaler("cpu", growth_interval=7)
    ours, peer = torch.optim.SGD([own], lr=0.1), torch.optim.SGD([theirs], lr=0.1)
    torch.manual_seed(0)
    seen = set()
    for step in range(200):
        gradient = torch.randn(5)
        if step % 11 == 5 or 40 <= step < 45:
            gradient[step % 5] = math.inf if step % 2 else math.nan
        own.grad = gradient * scaler.scale
        scaler.unscale([own])
        norm = gradient_norm([own])
        if torch.isfinite(norm):
            ours.step()
        scaler.update(~torch.isfinite(norm))
        stock.scale(torch.zeros(()))  # makes its scale
        theirs.grad = gradient * stock.get_scale()
        stock.step(peer)
        stock.update()
        assert scaler.scale.item() == stock.get_scale()
        assert torch.equal(own, theirs)
        seen.add(scaler.scale.item())
    assert len(seen) > 3


def test_it_never_falls_below_the_floor_and_goes_on_from_its_state() -> None:
    scaler = Scaler(CPU)
    bad, good = torch.tensor(True), torch.tensor(False)
    for _ in range(40):
        scaler.update(bad)
    assert scaler.scale.item() == FLOOR
    for _ in range(INTERVAL - 1):
        scaler.update(good)
    other = Scaler(CPU)
    other.load_state(json.loads(json.dumps(scaler.state())))
    for each in (scaler, other):
        assert each.scale.item() == FLOOR
        each.update(good)
        assert each.scale.item() == 2 * FLOOR
    assert scaler_for(FP32, CPU) is None


@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
def test_gradients_are_near_those_in_float32(tiny_sd3: Any, adapter: Any) -> None:
    """Of a sample among a million, so small that many would be zero without scaling."""
    found = {}
    for name, precision, scale in (
        ("exact", FP32, 1.0),
        ("scaled", HALF, START),
        ("plain", HALF, 1.0),
    ):
        family = family_of("sd3")
        model = tiny_model("sd3", tiny_sd3)
        built = build(model, adapter, precision, Layout(), family, CPU, empty=False, seed=0)
        factor = torch.tensor(scale)
        micro_step(
            family, built.model, batch("sd3", 2), OBJECTIVE, precision, 1_000_000, None, factor
        )
        flat = [p.grad.flatten() / scale for p in built.trainable.values() if p.grad is not None]
        assert all(g.dtype == torch.float32 for g in flat)
        found[name] = torch.cat(flat).double()
    scaled, plain = ((found[n] - found["exact"]).norm().item() for n in ("scaled", "plain"))
    assert scaled < 0.02 * found["exact"].norm().item()
    zeros = [(found[name] == 0).double().mean().item() for name in ("scaled", "plain", "exact")]
    assert zeros[0] - zeros[2] < 0.25 * (zeros[1] - zeros[2])
    assert scaled < plain


@pytest.fixture
def plan(tmp_path: Any) -> Any:
    base = make_tiny("sd3", tmp_path / "sd3")
    plan, manifest = tiny_plan(
        "sd3", base, draw_data(tmp_path / "data"), tmp_path / "run", steps=6, every=2
    )
    components = tuple(
        evolve(c, dtype="float16") if c.trained else c for c in plan.model.components
    )
    model = evolve(plan.model, components=components)
    return evolve(plan, precision=HALF, model=model), manifest


def window(step: int, scale: float = 1.0) -> Any:
    """Of SD3's shapes."""
    whole = window_of(step, [(step, step + 1)])
    whole.batches = [evolve(batch("sd3", 2, step), latents=scale * batch("sd3", 2, step).latents)]
    return whole


def scaled(plan: Any) -> Any:
    return evolve(trained_of(plan), scaler=Scaler(CPU))


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_memory_is_simulated_byte_for_byte(rank: int) -> None:
    step = small("sd3", rank=rank, compute="float16", trained="float32", checkpointing=1)
    check(step)
    half, whole = (
        MODEL.course(each, each.shapes[0]).train_peak
        for each in (step, evolve(step, precision=FP32))
    )
    assert half["activations"] < 0.7 * whole["activations"]


def test_an_overflow_lowers_the_scale_and_changes_no_weight(plan: Any) -> None:
    trained = scaled(plan[0])
    assert trained.scaler is not None
    trained.scaler.scale.fill_(2.0**40)  # sure to overflow
    before = weights(trained)
    _, rows = run(plan[0], trained, [window(k) for k in range(3)])
    assert [row["loss_scale"] for row in rows] == [2.0**40, 2.0**39, 2.0**38]
    assert [row["overflowed"] for row in rows] == [1, 2, 3]
    assert all("skipped" not in row and "grad_norm" not in row for row in rows)
    assert all(torch.equal(p, before[n]) for n, p in trained.parameters.items())
    assert all(math.isfinite(row["loss"]) for row in rows)
    guard = Guard(0, rows)
    assert guard.overflowed == 3 and not guard.exhausted and guard.skipped == 0
    trained.scaler.scale.fill_(1024.0)
    _, (row,) = run(plan[0], trained, [window(3)])
    assert "overflowed" not in row and row["grad_norm"] > 0
    assert any(not torch.equal(p, before[n]) for n, p in trained.parameters.items())


def test_at_the_floor_an_overflow_is_a_bad_step(plan: Any) -> None:
    trained = scaled(plan[0])
    assert trained.scaler is not None
    trained.scaler.scale.fill_(FLOOR)
    with pytest.raises(RunFailed, match="step 1: loss"):
        one_update(plan[0], trained, window(0, scale=math.inf))
    judged = Guard(3).judge(1.0, math.inf, FLOOR)
    assert judged == {"skipped": 1}
    assert Guard(3).judge(1.0, math.inf, 2 * FLOOR) == {"overflowed": 1}
    assert Guard(3).judge(math.nan, math.inf, START) == {"skipped": 1}


@pytest.mark.parametrize("rate", [1e-3])
def test_losses_and_weights_stay_near_those_in_float32(plan: Any, rate: float) -> None:
    half = scaled(plan[0])
    exact_plan = evolve(
        plan[0],
        precision=FP32,
        model=evolve(
            plan[0].model,
            components=tuple(evolve(c, dtype="float32") for c in plan[0].model.components),
        ),
    )
    exact = trained_of(exact_plan)
    start = weights(exact)
    _, found = run(plan[0], half, [window(k) for k in range(6)])
    _, expected = run(exact_plan, exact, [window(k) for k in range(6)])
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0.01)
    moved = torch.cat([(p - start[n]).flatten() for n, p in exact.parameters.items()])
    apart = torch.cat(
        [(p - half.parameters[n]).flatten() for n, p in exact.parameters.items()]
    ).detach()
    assert apart.norm() < 0.1 * moved.norm()


def test_a_run_in_float16_goes_on_bit_for_bit(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale is halved at first and grows again, both before and after the checkpoint."""
    monkeypatch.setattr("runtime.scaler.START", 2.0**22)
    monkeypatch.setattr("runtime.scaler.INTERVAL", 2)
    whole, manifest = plan
    outcome = execute(whole, manifest, Recorder())
    folder = whole.run_folder
    assert outcome.status == "finished"
    saved = checkpoints.complete(outcome.run_folder / "checkpoints")
    states = [checkpoints.read_state(each)["scaler"] for each in saved]
    assert len({state["scale"] for state in states}) > 1 or len({s["good"] for s in states}) > 1
    last = checkpoints.load(saved[-1])
    for each in saved[1:]:
        for path in sorted(each.rglob("*"), reverse=True):
            path.unlink()
        each.rmdir()
    for path in sorted((outcome.result or saved[0]).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert outcome.result is not None
    outcome.result.rmdir()
    again = execute(whole, manifest, Recorder())
    assert str(again.run_folder) == folder
    found = checkpoints.load(checkpoints.complete(again.run_folder / "checkpoints")[-1])
    assert found.step == last.step == 6 and found.scaler == last.scaler
    assert all(torch.equal(found.weights[n], value) for n, value in last.weights.items())
