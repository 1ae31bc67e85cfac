"""The loop on its own: weighting, learning rates, guards, stopping; windows made by hand."""

from __future__ import annotations

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from attrs import evolve

from compiler.plan import Checkpoints, Layout, Schedule, Validation
from compiler.schedules import multiplier
from runtime import rng
from runtime.batch import Batch
from runtime.build import build
from runtime.ema import Ema
from runtime.errors import RunFailed
from runtime.events import Silent
from runtime.families import family_of
from runtime.loop import Actions, Trained, due, one_update, skip_unless, train
from runtime.optimizers import make_optimizer
from runtime.stop import Stop
from tests.runtime.plans import LORA, draw_data, tiny_plan
from tests.runtime.tiny import make_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny("sana", tmp_path_factory.mktemp("sana"))


@pytest.fixture
def plan(base, tmp_path):
    data = draw_data(tmp_path / "data")
    return tiny_plan("sana", base, data, tmp_path / "run", steps=6)[0]


def trained_of(plan) -> Trained:
    family = family_of(plan.model.family)
    built = build(
        plan.model, plan.adapter, plan.precision, Layout(), family, CPU, empty=False, seed=plan.seed
    )
    optimizer = make_optimizer(plan.optimizer, built.trainable.items(), CPU)
    ema = Ema(plan.ema, built.trainable.items()) if plan.ema else None
    return Trained(
        family=family,
        model=built.model,
        parameters=built.trainable,
        optimizer=optimizer,
        ema=ema,
    )


def batch_of(numbers, scale=1.0) -> Batch:
    """Samples by number; the same number is the same sample in any batch."""
    latents = torch.cat([rng.normal((1, 4, 8, 8), 0, "latents", n) for n in numbers])
    noise = torch.cat([rng.normal((1, 4, 8, 8), 0, "noise", n) for n in numbers])
    states = torch.cat([rng.normal((1, 5, 16), 0, "text", n) for n in numbers])
    return Batch(
        latents=latents * scale,
        noise=noise,
        sigmas=torch.tensor([0.1 + 0.8 * (n % 7) / 7 for n in numbers]),
        text={
            "encoder_hidden_states": states,
            "encoder_attention_mask": torch.ones(states.shape[:2], dtype=torch.int64),
        },
    )


def window_of(step, cuts, epoch=1, scale=1.0):
    numbers = [n for cut in cuts for n in cut]
    return SimpleNamespace(
        step=step,
        epoch=epoch,
        batches=[batch_of(cut, scale) for cut in cuts],
        samples=len(numbers),
        names=[f"sample-{n}" for n in numbers],
    )


class Recorder(Silent):
    """Keeps what the loop reports."""

    def __init__(self):
        self.rows = []
        self.texts = []

    def step(self, metrics):
        self.rows.append(dict(metrics))

    def message(self, text, level="info"):
        self.texts.append(text)


def run(plan, trained, windows, done=0, stop=None, actions=None):
    events = Recorder()
    actions = actions or Actions(checkpoint=lambda done, epoch: None, validate=lambda done: None)
    stop = stop or Stop(events)
    reached = train(
        plan,
        trained,
        windows,
        done,
        events=events,
        trackers=(),
        actions=actions,
        stop=stop,
    )
    return reached, events.rows


def weights(trained):
    return {name: p.detach().clone() for name, p in trained.parameters.items()}


@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("cuts", [[(0, 1), (2, 3), (4,)], [(0,), (1, 2, 3, 4)]])
def test_accumulation_equals_one_large_batch(plan, adapter, cuts):
    """Short batches included: every sample weighs the same. SGD, so that weights show gradients."""
    plan = evolve(
        plan,
        adapter=adapter,
        optimizer=evolve(plan.optimizer, name="sgd", arguments={"momentum": 0.9}, lr=0.1),
        max_grad_norm=0.0,
        ema=None,
    )
    large, small = trained_of(plan), trained_of(plan)
    before = weights(large)
    _, (one,) = run(
        evolve(plan, steps=evolve(plan.steps, total=1)), large, [window_of(0, [range(5)])]
    )
    _, (many,) = run(evolve(plan, steps=evolve(plan.steps, total=1)), small, [window_of(0, cuts)])
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert many["samples"] == 5
    moved = 0.0
    for name, p in large.parameters.items():
        change = p.detach() - before[name]
        moved += change.abs().sum().item()
        other = small.parameters[name].detach() - before[name]
        torch.testing.assert_close(other, change, rtol=1e-4, atol=1e-7)
    assert moved > 0


def test_metrics_and_learning_rates(plan):
    plan = evolve(
        plan, schedule=Schedule(name="cosine", warmup=2, length=6, end=0.1, power=1.0, cycles=1)
    )
    trained = trained_of(plan)
    reached, rows = run(
        plan, trained, (window_of(k, [(k, k + 1)], epoch=1 + k // 3) for k in range(9))
    )
    assert reached == 6
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert [row["lr"] for row in rows] == [1e-3 * multiplier(plan.schedule, k) for k in range(6)]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert all(row["seconds"] > 0 for row in rows)


def test_clipping(plan):
    clipped = evolve(
        plan,
        max_grad_norm=1e-3,
        optimizer=evolve(plan.optimizer, name="sgd", arguments={"momentum": 0.0}, lr=1.0),
        schedule=evolve(plan.schedule, name="constant", warmup=0),
    )
    trained = trained_of(clipped)
    before = weights(trained)
    row = one_update(clipped, trained, window_of(0, [(0, 1)]))
    change = [p.detach() - before[n] for n, p in trained.parameters.items()]
    norm = torch.sqrt(sum((c.double() ** 2).sum() for c in change)).item()
    assert row.grad_norm.item() > 1e-2
    assert norm == pytest.approx(1e-3, rel=1e-4)


def test_dropout_is_a_function_of_the_step(plan):
    """Going on from step 3 in a fresh process state gives what the whole run gives."""
    plan = evolve(plan, adapter=evolve(LORA, dropout=0.5), ema=None)
    windows = [window_of(k, [(k,), (k + 1, k + 2)]) for k in range(6)]
    whole = trained_of(plan)
    _, rows = run(plan, whole, windows)

    half = trained_of(plan)
    three = evolve(plan, steps=evolve(plan.steps, total=3))
    run(three, half, windows[:3])
    torch.manual_seed(999)  # history must not matter
    torch.randn(100)
    _, rest = run(plan, half, windows[3:], done=3)
    assert all(torch.equal(whole.parameters[n], p) for n, p in half.parameters.items())
    assert [r["loss"] for r in rest] == [r["loss"] for r in rows[3:]]

    other = evolve(plan, seed=8)
    again = trained_of(plan)
    _, different = run(other, again, windows)
    assert different[-1]["loss"] != rows[-1]["loss"]  # the adapter starts at zero


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_non_finite_loss_stops_before_the_update(plan, bad):
    trained = trained_of(plan)
    run(
        evolve(plan, steps=evolve(plan.steps, total=2)),
        trained,
        [window_of(k, [(k,)]) for k in (0, 1)],
    )
    before, average = weights(trained), dict(trained.ema.state())
    state = trained.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises(RunFailed, match=r"step 3: .*weights were not updated") as caught:
        run(plan, trained, [window_of(2, [(0,), (5,)], scale=bad)], done=2)
    assert "sample-0, sample-5" in caught.value.message
    why = (
        "learning rate"
        if math.isfinite(bad)
        else "embeddings of sample-0, sample-5 hold no numbers"
    )
    assert why in caught.value.help and "train.guard.skip=1" in caught.value.help
    assert all(torch.equal(p, before[n]) for n, p in trained.parameters.items())
    assert all(torch.equal(v, average[n]) for n, v in trained.ema.average.items())
    assert torch.equal(trained.optimizer.state_dict()["state"][0]["exp_avg"], state)


def test_an_infinite_gradient_is_found_though_the_loss_is_finite(plan):
    trained = trained_of(plan)
    parameter = next(p for n, p in trained.parameters.items() if ".lora_B." in n)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(RunFailed, match="gradient norm"):
        run(plan, trained, [window_of(0, [(0,)])])


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_fused_optimizer_skips_on_the_device(name):
    """What an accelerator does without being waited for."""
    from tests.runtime.optimizer_steps import planned

    p = torch.nn.Parameter(torch.ones(4))
    optimizer = make_optimizer(planned(name, fused=True), [("p", p)], CPU)
    p.grad = torch.ones(4)
    skip_unless(torch.tensor(True), optimizer)
    optimizer.step()
    after = p.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[p].items()}
    assert not torch.equal(after, torch.ones(4))
    p.grad = torch.full((4,), math.nan)
    skip_unless(torch.tensor(False), optimizer)
    optimizer.step()
    assert torch.equal(p, after)
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state[p].items())


def test_actions_come_when_due(plan):
    calls = []
    plan = evolve(
        plan,
        checkpoints=Checkpoints(every=4, keep=0),
        validation=evolve(plan.validation, every=3),
    )
    assert isinstance(plan.validation, Validation)
    actions = Actions(
        checkpoint=lambda done, epoch: calls.append(("save", done, epoch)),
        validate=lambda done: calls.append(("draw", done)),
    )
    windows = [window_of(k, [(k,)], epoch=k // 2 + 1) for k in range(6)]
    assert run(plan, trained_of(plan), windows, actions=actions)[0] == 6
    # The pictures after the last step are drawn once the result is written.
    assert calls == [("draw", 3), ("save", 4, 2), ("save", 6, 3)]
    assert [due(k, 2) for k in (1, 2, 3, 4)] == [False, True, False, True]
    assert not due(5, 0)


def test_no_window_is_there_between_two_steps(plan):
    """While pictures are drawn, and when the next window comes."""
    plan = evolve(plan, checkpoints=Checkpoints(every=1, keep=0))
    there = []

    def alive():
        return [each for each in there if each() is not None]

    def windows():
        for k in range(3):
            assert not alive()
            window = window_of(k, [(k,)])
            there.append(weakref.ref(window.batches[0].latents))
            held = [window]
            del window
            yield held.pop()

    actions = Actions(checkpoint=lambda done, epoch: seen.append(len(alive())), validate=None)
    seen = []
    run(plan, trained_of(plan), windows(), actions=actions)
    assert seen == [0, 0, 0]


def test_a_stop_request_finishes_the_step_and_saves(plan):
    calls = []
    stop = Stop(Silent())
    actions = Actions(checkpoint=lambda done, epoch: calls.append(done), validate=lambda done: None)

    def windows():
        for k in range(6):
            stop.requested = k == 2
            yield window_of(k, [(k,)])

    reached, rows = run(plan, trained_of(plan), windows(), stop=stop, actions=actions)
    assert reached == 3
    assert calls == [3]
    assert [row["step"] for row in rows] == [1, 2, 3]
