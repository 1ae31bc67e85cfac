"""Every row of the optimizer table: builds, costs what it says, and goes on bit for bit."""

from __future__ import annotations

import copy
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
    host_state,
    kept_weights,
    load_state,
    make_optimizer,
    own_arguments,
    set_lr,
    state_tensors,
)
from runtime.stand_in import simulated

CPU = torch.device("cpu")
HERE = [n for n, facts in OPTIMIZERS.items() if "cpu" in facts.devices and not facts.compiled]
FUSED_OR_NOT = [
    (name, fused)
    for name in HERE
    for fused in ((True, False) if "cpu" in OPTIMIZERS[name].fused else (False,))
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def needs(name: str) -> None:
    """Skip where the optimizer's package is not installed."""
    try:
        class_of(OPTIMIZERS[name])
    except MachineUnfit as error:
        pytest.skip(error.message)


def planned(name: str, fused: bool = False, **changes) -> Optimizer:
    needs(name)
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


def tree_bytes(tree) -> int:
    """Bytes of all tensors in it; of one that wraps others, those of the others."""
    if isinstance(tree, dict):
        return sum(map(tree_bytes, tree.values()))
    if isinstance(tree, list | tuple):
        return sum(map(tree_bytes, tree))
    if hasattr(tree, "__tensor_flatten__"):
        return sum(getattr(tree, name).nbytes for name in tree.__tensor_flatten__()[0])
    return tree.nbytes if isinstance(tree, torch.Tensor) else 0


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


def test_siblings_in_8_bits_keep_less():
    for facts in OPTIMIZERS.values():
        if facts.eight_bit:
            small = OPTIMIZERS[facts.eight_bit]
            assert small.state_bytes["float32"] < facts.state_bytes["float32"]


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
