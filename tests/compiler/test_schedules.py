"""Schedules against closed formulas, and against Diffusers' own after the warm-up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compiler.plan import Schedule
from compiler.schedules import SHAPES, curve, multiplier


def schedule(name, warmup=0, length=100, end=0.0, power=1.0, cycles=0.5) -> Schedule:
    return Schedule(name=name, warmup=warmup, length=length, end=end, power=power, cycles=cycles)


def test_warmup_wastes_no_step_and_reaches_one():
    values = [multiplier(schedule("constant", warmup=4, length=10), k) for k in range(10)]
    assert values == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("step", [5, 6, 20, 41, 49])
def test_formulas(step):
    p = (step - 5) / 45
    assert multiplier(schedule("linear", 5, 50, end=0.1), step) == pytest.approx(
        1 - 0.9 * p, rel=1e-15
    )
    assert multiplier(schedule("cosine", 5, 50, end=0.1), step) == pytest.approx(
        0.1 + 0.9 * math.cos(math.pi * p / 2) ** 2, rel=1e-14
    )
    assert multiplier(schedule("cosine", 5, 50, cycles=1.5), step) == pytest.approx(
        (1 + math.cos(3 * math.pi * p)) / 2, rel=1e-14, abs=1e-15
    )
    assert multiplier(schedule("polynomial", 5, 50, end=0.2, power=3.0), step) == pytest.approx(
        0.2 + 0.8 * (1 - p) ** 3, rel=1e-14
    )


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_end_is_reached_exactly_when_the_run_ends(name, warmup):
    s = schedule(name, warmup=warmup, length=60, end=0.25, power=2.0)
    assert multiplier(s, 60) == pytest.approx(0.25, abs=1e-15)
    assert multiplier(s, 61) == multiplier(s, 600) == multiplier(s, 60)
    assert multiplier(s, 59) > 0.25  # the last step is still trained at more than `end`
    assert multiplier(s, warmup) == 1.0


@pytest.mark.parametrize(
    ("name", "theirs", "arguments"),
    [
        ("constant", "constant_with_warmup", {}),
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("cosine", "cosine", {"num_cycles": 1.5}),
    ],
)
def test_equals_diffusers_after_the_warmup(name, theirs, arguments):
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if "num_cycles" in arguments:
        from diffusers.optimization import get_cosine_schedule_with_warmup

        reference = get_cosine_schedule_with_warmup(optimizer, 10, 80, num_cycles=1.5)
    else:
        reference = get_scheduler(theirs, optimizer, num_warmup_steps=10, num_training_steps=80)
    ours = schedule(name, 10, 80, cycles=arguments.get("num_cycles", 0.5))
    for step in range(80):
        if step >= 10:
            expected = optimizer.param_groups[0]["lr"]
            assert multiplier(ours, step) == pytest.approx(expected, rel=1e-14, abs=1e-15)
        optimizer.step()
        reference.step()


@given(
    name=st.sampled_from(sorted(SHAPES)),
    warmup=st.integers(0, 300),
    length=st.integers(1, 200),
    end=st.floats(0, 1),
    step=st.integers(0, 400),
)
def test_always_between_zero_and_one(name, warmup, length, end, step):
    s = schedule(name, warmup=warmup, length=length, end=end, power=1.7)
    value = multiplier(s, step)
    assert 0.0 <= value <= 1.0
    if step < length:
        assert value > 0.0 or name == "cosine"


def test_curve_has_both_ends():
    s = schedule("linear", length=11)
    assert curve(s, 11) == [multiplier(s, k) for k in range(11)]
    assert curve(s, 2) == [1.0, multiplier(s, 10)]
    assert curve(schedule("constant", length=1), 3) == [1.0, 1.0, 1.0]
