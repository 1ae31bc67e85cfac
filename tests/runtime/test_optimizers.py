"""Every row of the optimizer table: builds, steps as its library does, and costs what it says."""

from __future__ import annotations

import inspect
import sys

import attrs
import pytest
import torch
from torch import nn

from compiler.optimizers import OPTIMIZERS, state_bytes
from compiler.plan import Optimizer
from compiler.schema import OptimizerRecipe
from runtime.errors import MachineUnfit
from runtime.machine import compiler
from runtime.memory.measure import measure
from runtime.optimizers import (
    check_usable,
    class_of,
    kept_weights,
    make_optimizer,
    set_lr,
    state_tensors,
)
from runtime.stand_in import simulated
from tests.runtime.optimizer_steps import (
    CPU,
    HERE,
    needs,
    planned,
    train,
    tree_bytes,
    weights,
)


@pytest.mark.slow
def test_a_compiled_step_is_the_plain_one(tmp_path):
    """The first step compiles, which takes seconds; what it computes is the same."""
    if not compiler():
        pytest.skip("no C++ compiler")
    name, ends = "adamw-8bit", []
    for stance in ("default", "force_eager"):
        with torch.compiler.set_stance(stance):
            parameters = {"p": nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128))}
            train(make_optimizer(planned(name), parameters.items(), CPU), parameters, range(4))
            ends.append(parameters["p"].detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if not n.startswith("bnb-")])
def test_facts_agree_with_the_signature(name):
    check_signature(name)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n.startswith("bnb-")])
def test_facts_agree_with_the_signature_of_bitsandbytes(name):
    pytest.importorskip("bitsandbytes")
    check_signature(name)


def check_signature(name):
    """Every argument is one of the class's own, and so is its default unless the row says why."""
    needs(name)
    facts = OPTIMIZERS[name]
    taken = inspect.signature(class_of(facts)).parameters
    for key, value in facts.defaults.items():
        own = taken[facts.renamed.get(key, key)].default
        assert (own == value) != (key in facts.ours), (key, own, value)
    assert set(facts.optional) | set(facts.constants) <= set(taken)
    assert set(facts.ours) | set(facts.renamed) <= set(facts.arguments)


def test_every_argument_can_be_said_in_a_recipe_and_none_is_idle():
    keys = {key for facts in OPTIMIZERS.values() for key in facts.arguments}
    fields = {field.name for field in attrs.fields(OptimizerRecipe)}
    assert keys == fields - {"name", "lr"}


LRS = {
    "prodigy": 1.0,
    "radam-schedulefree": 0.2,
    "sgd": 0.02,
    "optimi-sgd": 0.02,
    "adagrad": 0.5,
    "adafactor": 0.1,
}


@pytest.mark.parametrize("name", HERE)
def test_thirty_steps_lower_a_quadratic_loss(name):
    """Both matrices and vectors move towards where the loss is least."""
    torch.manual_seed(1)
    parameters = {n: nn.Parameter(torch.randn(s)) for n, s in {"a": (24, 16), "b": (24,)}.items()}
    aims = {n: torch.randn(p.shape) for n, p in parameters.items()}
    arguments = {"d0": 1e-2} if name == "prodigy" else {}
    optimizer = make_optimizer(planned(name, **arguments), parameters.items(), CPU)
    set_lr(optimizer, LRS.get(name, 0.05))

    def losses():
        return {n: ((p - aims[n]) ** 2).sum() for n, p in parameters.items()}

    before = {n: loss.item() for n, loss in losses().items()}
    for _ in range(30):
        optimizer.zero_grad()
        sum(losses().values()).backward()
        optimizer.step()
    with kept_weights(optimizer, parameters.values()):
        after = {n: loss.item() for n, loss in losses().items()}
    assert all(after[n] < 0.8 * before[n] for n in parameters), (before, after)


@pytest.mark.parametrize("name", [n for n in HERE if not OPTIMIZERS[n].path.startswith("runtime")])
def test_equals_the_library_called_directly(name):
    """The table hands over what it says, and nothing that alters the defaults in a known way."""
    ours = weights(torch.float32)
    train(make_optimizer(planned(name), ours.items(), CPU), ours, range(4))
    theirs = weights(torch.float32)
    facts = OPTIMIZERS[name]
    direct = class_of(facts)(
        list(theirs.values()),
        lr=1e-2,
        **facts.constants,
        **{key: facts.defaults[key] for key in facts.ours},
    )
    if hasattr(direct, "train"):
        direct.train()
    train(direct, theirs, range(4))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_muon_is_the_stock_one_on_matrices_and_adamw_on_the_rest():
    ours = weights(torch.float32)
    train(make_optimizer(planned("muon"), ours.items(), CPU), ours, range(4))
    theirs = weights(torch.float32)
    parts = (
        torch.optim.Muon([theirs["a"]], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([theirs["b"]], lr=1e-2, weight_decay=0.1),
    )
    for part, name in zip(parts, "ab", strict=True):
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            drawn = {n: torch.randn(p.shape, generator=generator) for n, p in theirs.items()}
            theirs[name].grad = drawn[name]
            set_lr(part, 1e-2 / (1 + step))
            part.step()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_muon_by_its_formula():
    """One step of five Newton-Schulz iterations, in float64 and written anew: the update nears the
    orthogonal factor of the gradient, 0.2 sqrt(max(rows, columns)) in size."""
    torch.manual_seed(3)
    p = nn.Parameter(torch.zeros(12, 20))
    gradient = torch.randn(12, 20)
    optimizer = make_optimizer(planned("muon", weight_decay=0.0), [("p", p)], CPU)
    p.grad = gradient.clone()
    optimizer.step()
    u, _, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    expected = -1e-2 * 0.2 * 20**0.5 * (u @ v)
    moved = p.detach().double()
    cosine = (moved * expected).sum() / moved.norm() / expected.norm()
    assert cosine > 0.95
    assert moved.norm() == pytest.approx(expected.norm().item(), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_offloaded_one_is_adamw_to_the_bit(dtype):
    here, there = weights(dtype), weights(dtype)
    stock = planned("adamw")
    train(make_optimizer(stock, here.items(), CPU), here, range(5))
    offloaded = make_optimizer(planned("adamw-offload"), there.items(), CPU)
    train(offloaded, there, range(3))
    with torch.no_grad():  # somebody else sets a weight: the copy on the host must follow
        there["a"].add_(1.0).sub_(1.0)
    changed = there["a"].detach().clone()
    train(offloaded, there, range(3, 5))
    again = weights(dtype)
    optimizer = make_optimizer(stock, again.items(), CPU)
    train(optimizer, again, range(3))
    with torch.no_grad():
        again["a"].copy_(changed)
    train(optimizer, again, range(3, 5))
    assert torch.equal(there["b"], here["b"]) and torch.equal(there["a"], again["a"])
    assert not offloaded.state and len(offloaded.host_tensors) == 2 + 2 * 3  # and two steps


@pytest.mark.parametrize("name", ["adamw-schedulefree", "radam-schedulefree"])
def test_schedule_free_weights_are_kept_apart(name):
    """Inside, the average that the library's `eval` gives; afterwards, the same bits as ever."""
    watched, alone = weights(torch.float32), weights(torch.float32)
    one = make_optimizer(planned(name), watched.items(), CPU)
    other = make_optimizer(planned(name), alone.items(), CPU)
    train(one, watched, range(12))
    train(other, alone, range(12))
    trained = {n: p.detach().clone() for n, p in watched.items()}
    with kept_weights(one, watched.values()):
        kept = {n: p.detach().clone() for n, p in watched.items()}
    assert all(torch.equal(p, trained[n]) for n, p in watched.items())
    for n, p in watched.items():  # x = (y - (1 - beta1) z) / beta1
        y, z = trained[n].double(), one.state[p]["z"].double()
        torch.testing.assert_close(kept[n].double(), (y - 0.1 * z) / 0.9, rtol=1e-5, atol=1e-6)
    train(one, watched, range(12, 14))
    train(other, alone, range(12, 14))
    assert all(torch.equal(alone[n], p) for n, p in watched.items())


def test_other_optimizers_have_one_kind_of_weights():
    p = nn.Parameter(torch.ones(3))
    with kept_weights(make_optimizer(planned("adamw"), [("p", p)], CPU), [p]):
        assert torch.equal(p, torch.ones(3))


def test_small_updates_are_not_lost_where_the_row_says_so():
    """A thousandth of the weight, far below bfloat16's half step: rounding loses it, Kahan's sum
    does not."""
    moved = {}
    for name in ("sgd", "optimi-sgd"):
        p = nn.Parameter(torch.full((64,), 1.0).bfloat16())
        optimizer = make_optimizer(planned(name, momentum=0.0), [("p", p)], CPU)
        for _ in range(100):
            p.grad = torch.full_like(p, 0.1)
            optimizer.step()  # 1e-2 x 0.1
        moved[name] = 1.0 - p.detach().float().mean().item()
    assert moved["sgd"] == 0.0
    assert moved["optimi-sgd"] == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("name", [n for n, f in OPTIMIZERS.items() if f.bf16 == "stochastic"])
def test_small_updates_are_kept_on_average_where_they_are_rounded_at_random(name):
    """Adam's first steps on a constant gradient are the learning rate itself, here a twentieth of
    the distance between bfloat16 numbers below 1, of which rounding to the nearest loses all."""
    spacing = 2.0**-8
    moved = {}
    for chosen in ("adamw", name):
        torch.manual_seed(3)
        p = nn.Parameter(torch.ones(64, 128).bfloat16())
        with torch.compiler.set_stance("force_eager"):
            optimizer = make_optimizer(planned(chosen, weight_decay=0.0), [("p", p)], CPU)
            set_lr(optimizer, spacing / 20)
            for _ in range(10):
                p.grad = torch.full_like(p, 0.5)
                optimizer.step()
        moved[chosen] = (1.0 - p.detach().double()) / spacing
    assert not moved["adamw"].any()
    assert (moved[name] == moved[name].round()).all() and len(moved[name].unique()) > 2
    deviation = (10 * 0.05 * 0.95 / p.numel()) ** 0.5  # of the mean: ten draws of a twentieth each
    assert abs(moved[name].mean().item() - 0.5) < 5 * deviation + 0.02  # and states of few bits


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_can_be_simulated(name):
    """On meta tensors: with the real class, or with its state from the table."""
    p = nn.Parameter(torch.empty(256, 1024, device="meta"))
    small = nn.Parameter(torch.empty(100, device="meta"))
    chosen = Optimizer(name=name, lr=1.0, arguments=dict(OPTIMIZERS[name].defaults), fused=False)
    optimizer = simulated(chosen, [("p", p), ("s", small)], torch.device("cuda"))
    for _ in range(2):
        p.grad, small.grad = torch.empty_like(p), torch.empty_like(small)
        optimizer.step()
    if name not in ("adafactor", "came", "soap"):  # whose state depends on the shape
        expected = state_bytes(name, "float32", p.numel())
        assert tree_bytes(optimizer.state[p]) == pytest.approx(expected, rel=0.01)
    if OPTIMIZERS[name].block:  # too small for blocks
        moments = 3 if "ademamix" in name else 1 if "lion" in name or "adagrad" in name else 2
        assert tree_bytes(optimizer.state[small]) == moments * 4 * 100


@pytest.mark.parametrize("name", [n for n, f in OPTIMIZERS.items() if f.factored])
@pytest.mark.parametrize("shape", [(12, 40), (11,), (6, 5, 3, 3)])
def test_factors_are_those_of_the_real_step(name, shape):
    """Each a tensor of its own, and the step's counter in host memory."""
    found = []
    for make, device in ((make_optimizer, "cpu"), (simulated, "meta")):
        parameter = nn.Parameter(torch.ones(shape, device=device))
        optimizer = make(planned(name), [("p", parameter)], CPU)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = optimizer.state[parameter].items()
        found.append({k: (v.shape, v.dtype, v.device.type == device) for k, v in state})
    real, stand_in = found
    assert {k: v[:2] for k, v in stand_in.items()} == {k: v[:2] for k, v in real.items()}
    assert not stand_in["step"][2]
    assert all(there for k, (*_, there) in stand_in.items() if k != "step")


@pytest.mark.parametrize("name", [n for n, f in OPTIMIZERS.items() if f.reads_values])
def test_copies_are_measured(name):
    """Of the weight that is updated, over what is there before: three weights, the real step."""
    parameters = {n: nn.Parameter(torch.randn(512, 512)) for n in "abc"}
    optimizer = make_optimizer(planned(name), parameters.items(), CPU)
    train(optimizer, parameters, range(1))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    held = [*parameters.values(), *(p.grad for p in parameters.values())]
    held += state_tensors(optimizer)
    found = measure(lambda mark: optimizer.step(), CPU, {"all": held})
    extra = found.peak - sum(t.nbytes for t in held)
    assert extra / parameters["a"].nbytes == pytest.approx(OPTIMIZERS[name].copies, abs=0.05)


def test_what_is_missing_here_is_said(monkeypatch):
    chosen = Optimizer(name="lion", lr=1e-4, arguments={}, fused=False)
    monkeypatch.setitem(sys.modules, "optimi", None)
    with pytest.raises(MachineUnfit, match="needs the package `torch-optimi`") as caught:
        check_usable(chosen, "cpu")
    assert caught.value.help == "pip install torch-optimi"
    monkeypatch.setattr("runtime.optimizers.compiler", lambda: "")
    with pytest.raises(MachineUnfit, match=r"no C\+\+ compiler"):
        check_usable(Optimizer(name="adamw-8bit", lr=1e-4, arguments={}, fused=False), "cpu")
    monkeypatch.setattr("runtime.optimizers.version", lambda name: "")
    with pytest.raises(MachineUnfit, match="needs the package triton"):
        check_usable(Optimizer(name="adamw-8bit", lr=1e-4, arguments={}, fused=False), "cuda")
    with pytest.raises(MachineUnfit, match="does not run on mps"):
        check_usable(Optimizer(name="adamw-8bit", lr=1e-4, arguments={}, fused=False), "mps")


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


@pytest.mark.parametrize("name", HERE)
def test_which_ones_may_update_rows_of_weights_apart(name):
    """A rank of a sharded run has some rows of each weight, or none of a small one."""
    needs(name)
    torch.manual_seed(0)
    facts = OPTIMIZERS[name]
    plan = planned(name)
    if name == "prodigy":  # or its steps are too small to be seen
        plan = attrs.evolve(planned(name, d0=0.01), lr=1.0)
    start = {"matrix": torch.randn(6, 40), "bias": torch.randn(5)}
    if not facts.whole:
        start["single"] = torch.randn(1, 8)
    gradients = [{n: 2 * t + torch.randn(t.shape) for n, t in start.items()} for _ in range(12)]

    def trained(part):
        """The weights after some steps on what `part` takes of each."""
        mine = {n: nn.Parameter(part(t).clone()) for n, t in start.items()}
        optimizer = make_optimizer(plan, mine.items(), CPU)
        for gradient in gradients:
            for n, parameter in mine.items():
                parameter.grad = part(gradient[n]).clone()
            optimizer.step()
        return mine

    whole = trained(lambda tensor: tensor)
    first = trained(lambda tensor: tensor[: -(-len(tensor) // 2)])
    second = trained(lambda tensor: tensor[-(-len(tensor) // 2) :])
    parts = {n: torch.cat([first[n], second[n]]) for n in start}
    alike = all(torch.allclose(parts[n], whole[n], rtol=1e-6, atol=1e-7) for n in start)
    if facts.whole:
        assert not alike, facts.whole
    else:
        assert alike, "a fact says that it goes row by row"
