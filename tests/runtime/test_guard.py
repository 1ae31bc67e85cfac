"""Guards: bad steps are passed over exactly, spikes found and harmless, slowness is said once."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest
import torch
from attrs import evolve

from compiler.plan import Checkpoints
from compiler.plan import Guard as Rules
from runtime import checkpoints, loop
from runtime import pace as pace_module
from runtime.errors import RunFailed
from runtime.events import Silent
from runtime.execute import execute
from runtime.guard import LEAST, SPAN, Guard, causes, named, passed_over
from runtime.loop import Actions, Ledger, Row, train
from runtime.pace import Pace
from runtime.stop import Stop
from runtime.track.lines import METRICS
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.test_loop import Recorder, trained_of, weights, window_of
from tests.runtime.tiny import make_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny("sana", tmp_path_factory.mktemp("sana"))


@pytest.fixture
def plan(base, tmp_path):
    data = draw_data(tmp_path / "data")
    made = tiny_plan("sana", base, data, tmp_path / "run", steps=6)[0]
    return evolve(made, guard=Rules(skip=2))


def run(plan, trained, windows, done=0, history=()):
    events = Recorder()
    reached = train(
        plan,
        trained,
        windows,
        done,
        events=events,
        trackers=(),
        actions=Actions(checkpoint=lambda done, epoch: None, validate=lambda done: None),
        stop=Stop(events),
        history=history,
    )
    return reached, events


def windows_with(bad, count=6):
    return [
        window_of(k, [(k,), (k + 1,)], scale=math.nan if k in bad else 1.0) for k in range(count)
    ]


def until(plan, total):
    return evolve(plan, steps=evolve(plan.steps, total=total))


def test_a_bad_step_changes_no_weight_and_the_run_goes_on(plan):
    trained = trained_of(plan)
    run(until(plan, 2), trained, windows_with({2}))
    before = weights(trained)
    state = trained.optimizer.state_dict()["state"][0]
    before_state = {k: v.clone() for k, v in state.items()}
    _, events = run(until(plan, 3), trained, windows_with({2})[2:], done=2)
    assert all(torch.equal(p, before[n]) for n, p in trained.parameters.items())
    state = trained.optimizer.state_dict()["state"][0]
    assert all(torch.equal(v, before_state[k]) for k, v in state.items())
    assert all(p.grad is None for p in trained.parameters.values())
    (row,) = events.rows
    assert row["step"] == 3 and row["skipped"] == 1
    assert row["names"] == ["sample-2", "sample-3"]
    assert "loss" not in row and "grad_norm" not in row
    json.dumps(row, allow_nan=False)  # other programs read it
    (text,) = events.texts
    assert "step 3: loss nan" in text and "1 of at most 2" in text and "sample-2" in text
    reached, _ = run(plan, trained, windows_with({2})[3:], done=3)
    assert reached == 6
    assert not all(torch.equal(p, before[n]) for n, p in trained.parameters.items())


def test_the_limit_holds_over_a_resume(plan):
    """A run that goes on from step 3 ends at the same step as the whole one, with equal weights."""
    bad = {1, 3, 4}
    whole = trained_of(plan)
    with pytest.raises(
        RunFailed, match=r"step 5: .*2 such steps were passed over before"
    ) as caught:
        run(plan, whole, windows_with(bad))
    assert "train.guard.skip=3" in caught.value.help
    part = trained_of(plan)
    _, events = run(until(plan, 3), part, windows_with(bad))
    history = json.loads(json.dumps(events.rows))
    with pytest.raises(RunFailed, match="step 5: "):
        run(plan, part, windows_with(bad)[3:], done=3, history=history)
    assert all(torch.equal(whole.parameters[n], p) for n, p in part.parameters.items())
    allowed = evolve(plan, guard=Rules(skip=3))
    assert run(allowed, trained_of(plan), windows_with(bad))[0] == 6


def test_read_late_as_on_an_accelerator(plan):
    """Rows that are read together are judged one by one; those after the last straw are lost."""
    events = Recorder()
    ledger = Ledger(
        plan=plan, guard=Guard(1), pace=Pace(events), events=events, trackers=(), every=4
    )
    for step, loss in enumerate((1.0, math.inf, 2.0, math.nan), 1):
        row = Row(
            step=step,
            epoch=1,
            samples=2,
            lr=0.1,
            loss=torch.tensor(loss),
            grad_norm=torch.tensor(1.0),
            losses=torch.tensor([1.0, loss]),
            names=("good", "bad"),
        )
        if step < 4:
            ledger.add(row)
            assert events.rows == []
    with pytest.raises(RunFailed, match=r"step 4: loss nan.*Samples: bad$"):
        ledger.add(row)
    assert [(r["step"], r.get("skipped")) for r in events.rows] == [(1, None), (2, 1), (3, None)]


def expected_spikes(values):
    """The rule by its words, over plain lists."""
    found = []
    for at, value in enumerate(values):
        last = sorted(values[max(0, at - SPAN) : at])
        if len(last) < LEAST:
            continue
        middle = statistics.median(last)
        spread = 1.4826 * statistics.median([abs(v - middle) for v in last])
        if value > 3 * middle and value - middle > 8 * spread:
            found.append(at)
    return found


def test_spikes_are_what_the_rule_says():
    draw = random.Random(3)
    norms = [draw.lognormvariate(0, 0.3) for _ in range(600)]
    losses = [draw.uniform(0.2, 0.6) for _ in range(600)]
    for at in (5, 100, 399, 400):
        norms[at] *= 40
    losses[100] = 9.0
    guard, seen = Guard(0), []
    for at, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if verdict := guard.judge(loss, norm):
            seen.append((at, tuple(verdict["spike"])))
    assert [at for at, names in seen if "grad_norm" in names] == expected_spikes(norms)
    assert [at for at, names in seen if "loss" in names] == expected_spikes(losses) == [100]
    assert {100, 399, 400} <= {at for at, _ in seen} and 5 not in {at for at, _ in seen}
    assert len(seen) < 6  # ordinary noise is left alone


def test_spikes_after_a_resume_are_those_of_the_whole_run():
    draw = random.Random(4)
    values = [(draw.uniform(0, 1), draw.paretovariate(1.1)) for _ in range(400)]
    values[150] = (math.nan, 1.0)
    whole, rows = Guard(9), []
    for step, (loss, norm) in enumerate(values, 1):
        numbers = {k: v for k, v in (("loss", loss), ("grad_norm", norm)) if math.isfinite(v)}
        rows.append({"step": step, **numbers, **whole.judge(loss, norm)})
    rest = Guard(9, json.loads(json.dumps(rows[:200])))
    assert rest.skipped == 1
    for row, (loss, norm) in zip(rows[200:], values[200:], strict=True):
        assert rest.judge(loss, norm) == {k: v for k, v in row.items() if k == "spike"}
    assert any("spike" in row for row in rows[200:])


def test_causes_follow_from_the_plan(plan):
    usual = " ".join(causes(plan))
    assert "float16" not in usual and "too high for this data" in usual
    half = evolve(
        plan,
        precision=evolve(plan.precision, compute="float16", cache="float16"),
        model=evolve(
            plan.model,
            components=tuple(
                evolve(c, dtype="float16") if c.name in ("vae", "text_encoder") else c
                for c in plan.model.components
            ),
        ),
        optimizer=evolve(plan.optimizer, lr=10.0),
        max_grad_norm=0.0,
    )
    said = causes(half)
    assert said[0].startswith("Sana computed in float16")
    assert "vae and text_encoder in float16" in " ".join(said) or (
        "text_encoder and vae in float16" in " ".join(said)
    )
    assert "beyond what the optimizer takes" in " ".join(said)
    assert "not clipped" in " ".join(said)


def test_samples_are_named_by_their_own_loss():
    assert named(("a", "b", "c"), [1.0, math.nan, 2.0]) == "b"
    assert named(("a", "b"), [1.0, 2.0]) == "a, b"  # the gradient was bad
    assert named([f"n{k}" for k in range(30)], []).endswith("n11 and 18 more")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(pace_module.time, "perf_counter", lambda: self.now)


def test_a_stall_is_said_once(monkeypatch):
    events = Recorder()
    pace = Pace(events)
    for step in range(1, 60):
        pace.read(step, 30.0 if step in (5, 40, 50) else 1.0)
    (text,) = events.texts
    assert text.startswith("step 40 took 30.0 s; the median is 1 s")


def test_waiting_for_data_is_said_once(monkeypatch):
    clock, events = Clock(monkeypatch), Recorder()
    pace = Pace(events)

    def slow():
        for number in range(100):
            clock.now += 0.3
            yield number

    for step in pace.waited(slow()):
        clock.now += 0.1
        pace.read(step, 0.4)
    (text,) = events.texts
    assert "waited for data 75% of the time (0.30 s a step)" in text
    quick = Recorder()
    pace = Pace(quick)
    for step in pace.waited(range(100)):
        pace.read(step, 0.4)
    assert quick.texts == []


@pytest.mark.parametrize(("share", "said"), [(0.99, 1), (0.5, 0)])
def test_a_spill_is_said_where_memory_is_full(share, said):
    events, asked = Recorder(), []
    pace = Pace(events, lambda: asked.append(1) or share)
    for step in range(1, 50):
        pace.read(step, 1.0)
    assert not asked  # nobody is asked as long as all goes well
    for step in range(50, 60):
        pace.read(step, 2.5)
    assert len(events.texts) == said
    assert all("99% of the device's memory" in text for text in events.texts)


def test_an_update_that_overflows_ends_the_run_with_what_was_good(base, tmp_path, monkeypatch):
    """After the last step, too: nothing that is no number becomes the result."""
    plan, manifest = tiny_plan(
        "sana", base, draw_data(tmp_path / "data"), tmp_path / "run", steps=3, every=1
    )
    whole = evolve(plan, run_folder=str(tmp_path / "whole"))
    assert execute(whole, manifest, Silent()).status == "finished"
    stock, calls = loop.update, []

    def spoiling(optimizer, norm, most):
        stock(optimizer, norm, most)
        calls.append(1)
        if len(calls) == 3:
            optimizer.param_groups[0]["params"][0].data.fill_(math.inf)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", spoiling)
        with pytest.raises(RunFailed, match="step 3 left weights that are no numbers"):
            execute(plan, manifest, Silent())
    folder = tmp_path / "run"
    assert checkpoints.latest(folder / "checkpoints").name == "step-000002"
    assert not (folder / "lora").exists() and not (folder / "model").exists()
    assert execute(plan, manifest, Silent()).status == "finished"
    last, expected = (
        checkpoints.load(checkpoints.latest(place / "checkpoints")).weights
        for place in (folder, tmp_path / "whole")
    )
    assert all(torch.equal(last[name], tensor) for name, tensor in expected.items())


def test_the_last_good_checkpoint_stays_and_is_named(base, tmp_path):
    """A rate so high that the weights of step 2 give no numbers, though they are some: steps after
    it are passed over, and their checkpoints hold the same weights."""
    data = draw_data(tmp_path / "data")
    made, manifest = tiny_plan(
        "sana", base, data, tmp_path / "run", steps=8, lr=3e3, optimizer="sgd"
    )
    plan = evolve(
        made,
        guard=Rules(skip=2),
        checkpoints=Checkpoints(every=1, keep=1),
        max_grad_norm=0.0,
    )
    with pytest.raises(RunFailed, match="2 such steps were passed over before") as caught:
        execute(plan, manifest, Silent())
    root = tmp_path / "run" / "checkpoints"
    steps = [checkpoints.step_of(folder) for folder in checkpoints.complete(root)]
    first = min(passed_over(tmp_path / "run" / METRICS, 9))
    assert steps == [first - 2, first + 1]
    assert f"is step-{first - 2:06d}: to go on from there, move" in caught.value.help
