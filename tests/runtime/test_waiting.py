"""A step never waits for the device: nothing reads a value of a tensor, except to log it.

Tensors on the meta device have no values, and reading one (`item`, `tolist`, `cpu`, `if tensor`)
fails there. So a step that runs on them, by the branches of a CUDA device, reads none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attrs import evolve

from compiler.plan import Layout, Plan, Precision
from runtime.build import build
from runtime.families import family_of
from runtime.loop import LOG_EVERY, Ledger, Trained, one_update
from runtime.memory.pretend import as_on
from runtime.optimizers import make_optimizer
from runtime.scaler import scaler_for
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.test_loop import Recorder, window_of
from tests.runtime.tiny import make_tiny

META = torch.device("meta")
FP32 = Precision(compute="float32", weights="float32", trained="float32", cache="float32")
MIXED = evolve(FP32, compute="bfloat16", weights="bfloat16")
HALF = evolve(FP32, compute="float16", weights="float16")


@pytest.fixture
def plan(tmp_path: Any) -> Plan:
    base = make_tiny("sana", tmp_path / "sana")
    made, _ = tiny_plan("sana", base, draw_data(tmp_path / "data"), tmp_path / "run", steps=50)
    return evolve(made, ema=None, optimizer=evolve(made.optimizer, name="adamw", fused=True))


@pytest.fixture
def pretended() -> Iterator[None]:
    with as_on("cuda"):
        yield


def on_meta(plan: Plan, layout: Layout | None = None) -> Trained:
    family = family_of(plan.model.family)
    given = (plan.model, plan.adapter, plan.precision, layout or Layout(), family, META)
    with META:
        built = build(*given, empty=True, seed=0)
    optimizer = make_optimizer(plan.optimizer, built.trainable.items(), torch.device("cuda"))
    return Trained(
        family=family,
        model=built.model,
        parameters=built.trainable,
        optimizer=optimizer,
        ema=None,
        scaler=scaler_for(plan.precision, META),
    )


def window(step: int) -> Any:
    """Two micro-batches on the meta device."""
    made = window_of(step, [(step,), (step + 1, step + 2)])
    made.batches = [
        evolve(
            batch,
            latents=batch.latents.to(META),
            noise=batch.noise.to(META),
            sigmas=batch.sigmas.to(META),
            text={name: tensor.to(META) for name, tensor in batch.text.items()},
        )
        for batch in made.batches
    ]
    return made


@pytest.mark.parametrize("precision", [FP32, MIXED, HALF], ids=["fp32", "mixed", "half"])
@pytest.mark.parametrize("every", [0, 1])
def test_no_value_is_read_in_a_step(
    plan: Plan, precision: Precision, every: int, pretended: None
) -> None:
    plan = evolve(plan, precision=precision)
    trained = on_meta(plan, Layout(activation_checkpointing=every))
    for step in range(3):
        row = one_update(plan, trained, window(step))
        assert row.loss.is_meta and row.grad_norm.is_meta
        assert all(p.grad is None for p in trained.parameters.values())


def test_metrics_wait_until_their_turn(plan: Plan, pretended: None) -> None:
    """So many rows are kept unread; reading them is what fails here."""
    trained = on_meta(plan)
    ledger: Any = Ledger(
        plan=plan, guard=None, pace=None, events=Recorder(), trackers=(), every=LOG_EVERY
    )  # type: ignore[arg-type]
    for step in range(LOG_EVERY - 1):
        ledger.add(one_update(plan, trained, window(step)))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        ledger.add(one_update(plan, trained, window(LOG_EVERY)))


def test_an_optimizer_without_a_fused_kernel_waits(plan: Plan, pretended: None) -> None:
    """It can't be told on the device to leave weights alone, so the loss is read before it steps:
    a bad step must change no weight. This is also how a reading step fails here."""
    trained = on_meta(evolve(plan, optimizer=evolve(plan.optimizer, fused=False)))
    with pytest.raises(RuntimeError, match="meta"):
        one_update(plan, trained, window(0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_step_waits_on_a_real_device(plan: Plan) -> None:
    device = torch.device("cuda")
    family = family_of(plan.model.family)
    given = (plan.model, plan.adapter, plan.precision, Layout(), family, device)
    built = build(*given, empty=False, seed=0)
    trained = Trained(
        family=family,
        model=built.model,
        parameters=built.trainable,
        optimizer=make_optimizer(plan.optimizer, built.trainable.items(), device),
        ema=None,
    )
    windows = [window_of(step, [(step,), (step + 1, step + 2)]) for step in range(4)]
    for made in windows:
        made.batches = [
            evolve(
                batch,
                latents=batch.latents.to(device),
                noise=batch.noise.to(device),
                sigmas=batch.sigmas.to(device),
                text={name: tensor.to(device) for name, tensor in batch.text.items()},
            )
            for batch in made.batches
        ]
    here = evolve(plan, device="cuda")
    one_update(here, trained, windows[0])  # kernels are loaded, states made
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = [one_update(here, trained, made) for made in windows[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(row.loss).item() for row in rows)
