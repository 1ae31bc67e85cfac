"""The states of every optimizer: as large as the table says, and gone on with bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compiler.optimizers import OPTIMIZERS, state_bytes
from runtime.optimizers import (
    host_state,
    load_state,
    make_optimizer,
    own_arguments,
    set_lr,
    state_tensors,
)
from tests.runtime.optimizer_steps import (
    CPU,
    DTYPES,
    FUSED_OR_NOT,
    HERE,
    needs,
    planned,
    train,
    tree_bytes,
    weights,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "fused"), FUSED_OR_NOT)
def test_resume_is_bit_exact(name, fused, dtype, tmp_path):
    whole = weights(dtype)
    train(make_optimizer(planned(name, fused), whole.items(), CPU), whole, range(9))

    first = weights(dtype)
    optimizer = make_optimizer(planned(name, fused), first.items(), CPU)
    train(optimizer, first, range(4))
    torch.save(host_state(optimizer), tmp_path / "o.pt")
    again = copy.deepcopy(first)
    restored = make_optimizer(planned(name, fused), again.items(), CPU)
    with own_arguments(restored, planned(name, fused)):  # the same: counters stay as they were
        load_state(restored, torch.load(tmp_path / "o.pt", weights_only=True))
    train(restored, again, range(4, 9))
    assert all(torch.equal(whole[n], again[n]) for n in whole)


def others(value):
    """Other values of an argument, those at its end among them."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 10]
        case float():
            return [0.0, value / 2 or 0.5]
        case (first, *rest):
            return [(0.0, *rest), (first, *(0.0 for _ in rest)), (first / 2, *rest)]


@pytest.mark.parametrize("name", HERE)
def test_a_state_bears_other_values_of_what_does_not_shape_it(name):
    """Both ways: what a value leaves out, another one may want."""
    needs(name)
    facts = OPTIMIZERS[name]
    for key, usual in facts.defaults.items():
        pairs = [pair for to in others(usual) for pair in ((usual, to), (to, usual))]
        for before, after in pairs if key not in facts.shaping else ():
            first = weights(torch.float32)
            try:
                optimizer = make_optimizer(planned(name, **{key: before}), first.items(), CPU)
                train(optimizer, first, range(2))
                chosen = planned(name, **{key: after})
                restored = make_optimizer(chosen, first.items(), CPU)
            except (ValueError, ZeroDivisionError):  # no value that a recipe may give
                continue
            with own_arguments(restored, chosen):
                load_state(restored, host_state(optimizer))
            train(restored, first, range(2, 4))


def test_what_shapes_a_state_is_known_by_its_row():
    for name, (key, value) in {
        "prodigy": ("slice_p", 11),
        "optimi-sgd": ("momentum", 0.0),
        "soap": ("max_precondition_dim", 20),
    }.items():
        assert key in OPTIMIZERS[name].shaping
        needs(name)
        kept = []
        for chosen in (planned(name), planned(name, **{key: value})):
            parameters = weights(torch.float32)
            optimizer = make_optimizer(chosen, parameters.items(), CPU)
            train(optimizer, parameters, range(2))
            kept.append([each.shape for each in state_tensors(optimizer)])
        assert kept[0] != kept[1]


@pytest.mark.parametrize("name", ["adamw", "adamw-offload", "adamw-schedulefree"])
def test_a_changed_argument_holds_from_the_state_on(name):
    """Decoupled weight decay takes lr x decay of the weight, whatever the moments say."""
    needs(name)
    start, lr = torch.randn(64, 32, dtype=torch.float64), 1e-2
    ends = {}
    for decay in (0.1, 0.3):
        p = nn.Parameter(start.float())
        optimizer = make_optimizer(planned(name, weight_decay=0.1), [("p", p)], CPU)
        train(optimizer, {"p": p}, range(3))
        before, state = p.detach().clone(), host_state(optimizer)
        again = nn.Parameter(before.clone())
        chosen = planned(name, weight_decay=decay)
        restored = make_optimizer(chosen, [("p", again)], CPU)
        with own_arguments(restored, chosen):
            load_state(restored, state)
        assert {group["weight_decay"] for group in restored.param_groups} == {decay}
        again.grad = torch.ones_like(again)
        set_lr(restored, lr)
        restored.step()
        ends[decay] = again.detach().double()
    if name != "adamw-schedulefree":  # which also averages
        torch.testing.assert_close(
            ends[0.1] - ends[0.3], lr * 0.2 * before.double(), rtol=1e-3, atol=1e-6
        )
    assert not torch.equal(ends[0.1], ends[0.3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [n for n, f in OPTIMIZERS.items() if f.compiled])
def test_low_bit_ones_resume_and_keep_few_bytes(name, dtype, tmp_path):
    """Not compiled here, for speed. The loop seeds stochastic rounding, so each step does."""
    if dtype not in OPTIMIZERS[name].weights:
        pytest.skip("trains other weights")

    def steps(optimizer, weight, numbers):
        for number in numbers:
            torch.manual_seed(number)
            train(optimizer, {"p": weight}, [number])

    def fresh(weight):
        return make_optimizer(planned(name), [("p", weight)], CPU)

    start = torch.randn(64, 128).to(DTYPES[dtype])
    whole, first = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    with torch.compiler.set_stance("force_eager"):
        steps(fresh(whole), whole, range(5))
        optimizer = fresh(first)
        steps(optimizer, first, range(2))
        torch.save(host_state(optimizer), tmp_path / "o.pt")
        again = nn.Parameter(first.detach().clone())
        restored = fresh(again)
        load_state(restored, torch.load(tmp_path / "o.pt", weights_only=True))
        steps(restored, again, range(2, 5))
        assert torch.equal(whole, again) and not torch.equal(whole, start)

        large = nn.Parameter(torch.zeros(1024, 1024, dtype=DTYPES[dtype]))
        grown = fresh(large)
        steps(grown, large, [0])
    expected = state_bytes(name, dtype, large.numel())
    assert tree_bytes(grown.state[large]) == pytest.approx(expected, rel=0.01)
    assert sum(t.nbytes for t in state_tensors(grown)) == tree_bytes(grown.state[large])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", HERE)
def test_state_bytes_are_measured(name, dtype):
    # An eigenbasis of that size takes seconds on a processor; of four small ones it does not.
    side = 128 if name == "soap" else 1024
    p = nn.Parameter(torch.ones(side, side, dtype=DTYPES[dtype]))
    optimizer = make_optimizer(planned(name), [("p", p)], CPU)
    train(optimizer, {"p": p}, range(1))
    expected = state_bytes(name, dtype, p.numel())
    assert tree_bytes(optimizer.state[p]) == pytest.approx(expected, rel=0.01, abs=8)


def test_siblings_in_8_bits_keep_less():
    for facts in OPTIMIZERS.values():
        if facts.eight_bit:
            small = OPTIMIZERS[facts.eight_bit]
            assert small.state_bytes["float32"] < facts.state_bytes["float32"]


class WideState(torch.optim.Optimizer):
    """Keeps a float32 state for bfloat16 weights, as several low-precision optimizers do."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p, dtype=torch.float32))
            mean.mul_(0.9).add_(p.grad.float())
            p.sub_((0.1 * mean).to(p.dtype))


def test_states_wider_than_weights_are_restored_exactly():
    p = nn.Parameter(torch.randn(64).bfloat16())
    optimizer = WideState([p])
    train(optimizer, {"p": p}, range(3))
    saved = host_state(optimizer)

    plain = WideState([nn.Parameter(p.detach().clone())])
    plain.load_state_dict(copy.deepcopy(saved))
    assert next(iter(plain.state.values()))["mean"].dtype == torch.bfloat16  # why load_state exists

    exact = WideState([nn.Parameter(p.detach().clone())])
    load_state(exact, saved)
    mean = next(iter(exact.state.values()))["mean"]
    assert mean.dtype == torch.float32
    assert torch.equal(mean, optimizer.state[p]["mean"])
    mean.zero_()
    assert saved["state"][0]["mean"].abs().sum() > 0  # what was saved is not shared


def test_host_state_does_not_follow_training():
    p = nn.Parameter(torch.randn(8))
    optimizer = make_optimizer(planned("adamw"), [("p", p)], CPU)
    train(optimizer, {"p": p}, range(2))
    saved = host_state(optimizer)
    before = saved["state"][0]["exp_avg"].clone()
    train(optimizer, {"p": p}, range(2, 4))
    assert torch.equal(saved["state"][0]["exp_avg"], before)
