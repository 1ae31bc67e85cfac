"""Every row of the optimizer table: builds, costs what it says, and goes on bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compiler.optimizers import OPTIMIZERS, state_bytes
from compiler.plan import Optimizer
from runtime.errors import MachineUnfit
from runtime.optimizers import host_state, load_state, make_optimizer, set_lr

CPU = torch.device("cpu")
FUSED_OR_NOT = [
    (name, fused)
    for name, facts in OPTIMIZERS.items()
    for fused in ((True, False) if "cpu" in facts.fused else (False,))
]


def planned(name: str, fused: bool = False, **changes) -> Optimizer:
    arguments = {**OPTIMIZERS[name].defaults, **changes}
    return Optimizer(name=name, lr=1e-2, arguments=arguments, fused=fused)


def weights(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        n: nn.Parameter(torch.randn(s).to(dtype)) for n, s in {"a": (37, 53), "b": (11,)}.items()
    }


def train(optimizer, parameters, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        set_lr(optimizer, 1e-2 / (1 + step))
        optimizer.step()


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
    load_state(restored, torch.load(tmp_path / "o.pt", weights_only=True))
    train(restored, again, range(4, 9))
    assert all(torch.equal(whole[n], again[n]) for n in whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_bytes_are_measured(name, dtype):
    p = nn.Parameter(torch.zeros(1000, 100, dtype=getattr(torch, dtype)))
    optimizer = make_optimizer(planned(name), [("p", p)], CPU)
    train(optimizer, {"p": p}, range(1))
    measured = sum(v.nbytes for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
    assert state_bytes(name, dtype, p.numel()) == pytest.approx(measured, abs=8)


def test_arguments_reach_the_optimizer():
    p = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(
        planned("adamw", True, betas=[0.8, 0.95], weight_decay=0.3), [("p", p)], CPU
    )
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.8, 0.95), 0.3, 1e-2)
    assert group["fused"] is True
    assert group["param_names"] == ["p"]


def test_no_fused_kernel_is_said():
    with pytest.raises(MachineUnfit, match="`radam` has no fused kernel on cpu"):
        make_optimizer(planned("radam", fused=True), [("p", nn.Parameter(torch.zeros(1)))], CPU)


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
