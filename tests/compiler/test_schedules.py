"""Schedules against closed formulas, and against Diffusers' own after the warm-up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compiler.plan import Schedule
from compiler.schedules import SHAPES, curve, multiplier


def schedule(name, warmup=0, length=100, end=0.0, power=1.0, cycles=1) -> Schedule:
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
    falls = 3 * p - math.floor(3 * p)  # of the third, say, that the step lies in
    restarts = schedule("cosine-with-restarts", 5, 50, end=0.1, cycles=3)
    assert multiplier(restarts, step) == pytest.approx(
        0.1 + 0.9 * math.cos(math.pi * falls / 2) ** 2, rel=1e-12
    )
    assert multiplier(schedule("polynomial", 5, 50, end=0.2, power=3.0), step) == pytest.approx(
        0.2 + 0.8 * (1 - p) ** 3, rel=1e-14
    )


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine-with-restarts", "polynomial"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_end_is_reached_exactly_when_the_run_ends(name, warmup):
    s = schedule(name, warmup=warmup, length=60, end=0.25, power=2.0)
    assert multiplier(s, 60) == pytest.approx(0.25, abs=1e-15)
    assert multiplier(s, 61) == multiplier(s, 600) == multiplier(s, 60)
    assert multiplier(s, 59) > 0.25  # the last step is still trained at more than `end`
    assert multiplier(s, warmup) == 1.0


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize(
    ("name", "theirs", "arguments", "shape"),
    [
        ("constant", "get_constant_schedule_with_warmup", {}, {}),
        ("linear", "get_linear_schedule_with_warmup", {}, {}),
        ("cosine", "get_cosine_schedule_with_warmup", {}, {}),
        (
            "cosine-with-restarts",
            "get_cosine_with_hard_restarts_schedule_with_warmup",
            {"num_cycles": 3},
            {"cycles": 3},
        ),
        (
            "polynomial",
            "get_polynomial_decay_schedule_with_warmup",
            {"lr_end": 0.25, "power": 2.5},
            {"end": 0.25, "power": 2.5},
        ),
    ],
)
def test_equals_the_libraries_after_the_warmup(library, name, theirs, arguments, shape):
    import importlib

    make = getattr(importlib.import_module(f"{library}.optimization"), theirs)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if name != "constant":
        arguments = {"num_training_steps": 80, **arguments}
    reference = make(optimizer, num_warmup_steps=10, **arguments)
    ours = schedule(name, 10, 80, **shape)
    for step in range(80):
        if step >= 10:
            expected = optimizer.param_groups[0]["lr"]
            assert multiplier(ours, step) == pytest.approx(expected, rel=1e-13, abs=1e-15)
        optimizer.step()
        reference.step()


def test_equals_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60, eta_min=0.1)
    for step in range(60):
        expected = optimizer.param_groups[0]["lr"]
        assert multiplier(schedule("cosine", 0, 60, end=0.1), step) == pytest.approx(expected)
        optimizer.step()
        cosine.step()


def test_restarts_begin_at_the_full_rate():
    """Three falls over 30 steps: steps 0, 10 and 20 are trained at the recipe's rate."""
    values = [multiplier(schedule("cosine-with-restarts", 0, 30, cycles=3), k) for k in range(30)]
    assert [k for k, value in enumerate(values) if value == pytest.approx(1.0)] == [0, 10, 20]
    assert values[10:20] == pytest.approx(values[:10])
    assert values[20:] == pytest.approx(values[:10])
    once = [multiplier(schedule("cosine-with-restarts", 5, 30), k) for k in range(30)]
    assert once == pytest.approx([multiplier(schedule("cosine", 5, 30), k) for k in range(30)])


@given(
    name=st.sampled_from(sorted(SHAPES)),
    warmup=st.integers(0, 300),
    length=st.integers(1, 200),
    end=st.floats(0, 1),
    step=st.integers(0, 400),
    cycles=st.integers(1, 9),
)
def test_always_between_zero_and_one(name, warmup, length, end, step, cycles):
    s = schedule(name, warmup=warmup, length=length, end=end, power=1.7, cycles=cycles)
    value = multiplier(s, step)
    assert 0.0 <= value <= 1.0
    if step < length:
        assert value > 0.0 or name.startswith("cosine")


def test_curve_has_both_ends():
    s = schedule("linear", length=11)
    assert curve(s, 11) == [multiplier(s, k) for k in range(11)]
    assert curve(s, 2) == [1.0, multiplier(s, 10)]
    assert curve(schedule("constant", length=1), 3) == [1.0, 1.0, 1.0]
