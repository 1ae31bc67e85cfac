"""Updating weights in the backward pass: the same bits, a lower peak, nothing spoiled unsaid."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from attrs import evolve
from torch import nn

from compiler.optimizers import OPTIMIZERS
from compiler.plan import Adapter, Layout, Optimizer, Precision, Text
from runtime.build import build
from runtime.errors import RunFailed
from runtime.families import family_of
from runtime.fused_backward import FusedBackward
from runtime.loop import Trained, one_update
from runtime.memory.measure import measure
from runtime.memory.pretend import as_on
from runtime.methods.base import Built
from runtime.optimizers import host_state, make_optimizer, state_tensors
from runtime.stand_in import simulated
from runtime.step import gradient_norm, micro_step, update
from tests.runtime.optimizer_steps import needs, tree_bytes
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.test_loop import trained_of, weights, window_of
from tests.runtime.test_step import BF16, FP32, LORA, MIXED, OBJECTIVE, batch, made
from tests.runtime.tiny import make_tiny, tiny_model

CPU = torch.device("cpu")
POSSIBLE = [
    name
    for name, facts in OPTIMIZERS.items()
    if "cpu" in facts.devices and "float32" in facts.weights and not facts.not_in_backward
]


def optimizer_of(name: str, built: Built, fused: bool = False) -> torch.optim.Optimizer:
    needs(name)
    arguments = dict(OPTIMIZERS[name].defaults)
    planned = Optimizer(name=name, lr=1e-3, arguments=arguments, fused=fused)
    return make_optimizer(planned, built.trainable.items(), CPU)


@pytest.fixture(params=["sana", "sd3"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


def trained_both_ways(
    folder: Path, name: str, adapter: Adapter | None, precision: Precision, every: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Three steps with and without; all weights and states, and the norms of the gradients."""
    ends, norms = [], []
    for fuse in (False, True):
        family, built = made(folder, adapter, precision, every)
        optimizer = optimizer_of(name, built)
        fused = FusedBackward(built.model, built.trainable, optimizer) if fuse else None
        for step in range(3):
            example = batch(folder.name, 2, step)
            ready = fused.begin if fused else None
            micro_step(family, built.model, example, OBJECTIVE, precision, 2, ready)
            if fused:
                norms.append(fused.finish())
                assert all(p.grad is None for p in built.trainable.values())
            else:
                norms.append(gradient_norm(built.trainable.values()))
                update(optimizer, norms[-1], 0.0)
        states = host_state(optimizer)["state"]
        kept = [t for n in sorted(states) for t in states[n].values() if torch.is_tensor(t)]
        ends.append([*(p.detach() for p in built.trainable.values()), *kept])
    for one, other in zip(norms[:3], norms[3:], strict=True):
        rough = precision.trained == "bfloat16"  # there the ordinary norm is bfloat16 itself
        torch.testing.assert_close(other, one.float(), rtol=1e-2 if rough else 1e-6, atol=0)
    return ends[0], ends[1]


@pytest.mark.parametrize("precision", [FP32, MIXED, BF16], ids=["fp32", "mixed", "bf16"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_weights_and_states_are_the_same_bits(
    folder: Path, adapter: Adapter | None, precision: Precision
) -> None:
    apart, fused = trained_both_ways(folder, "adamw", adapter, precision)
    assert len(apart) == len(fused) > 0
    assert all(torch.equal(one, other) for one, other in zip(apart, fused, strict=True))


@pytest.mark.parametrize("name", POSSIBLE)
def test_every_optimizer_that_claims_it_can(tiny_sana: Path, name: str) -> None:
    with torch.compiler.set_stance("force_eager"):  # for speed: some compile their step
        apart, fused = trained_both_ways(tiny_sana, name, LORA, MIXED)
    assert all(torch.equal(one, other) for one, other in zip(apart, fused, strict=True))


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_with_recomputed_blocks(folder: Path, adapter: Adapter | None) -> None:
    apart, fused = trained_both_ways(folder, "adamw", adapter, MIXED, every=1)
    assert all(torch.equal(one, other) for one, other in zip(apart, fused, strict=True))


def test_a_state_goes_on_either_way(tiny_sana: Path) -> None:
    """What is saved is the same, so a run may go on with the other layout."""
    family, built = made(tiny_sana, LORA)
    optimizer = optimizer_of("adamw", built)
    plain = optimizer.state_dict()["param_groups"]
    fused = FusedBackward(built.model, built.trainable, optimizer)
    micro_step(family, built.model, batch("sana", 2), OBJECTIVE, FP32, 2, fused.begin)
    fused.finish()
    assert optimizer.state_dict()["param_groups"] == plain
    fused.remove()
    micro_step(family, built.model, batch("sana", 2), OBJECTIVE, FP32, 2)
    assert any(p.grad is not None for p in built.trainable.values())


@pytest.mark.parametrize("precision", [FP32, MIXED], ids=["fp32", "mixed"])
def test_gradients_are_never_there_together(tiny_sana: Path, precision: Precision) -> None:
    """Bytes of gradients alive at any time: all of them without, the largest few with."""
    most = {}
    for fuse in (False, True):
        family, built = made(tiny_sana, None, precision)
        optimizer = optimizer_of("adamw", built)
        fused = FusedBackward(built.model, built.trainable, optimizer) if fuse else None
        peaks = [0]

        def count(_: torch.Tensor, built: Built = built, peaks: list[int] = peaks) -> None:
            held = (*built.model.parameters(), *built.trainable.values())
            peaks.append(sum({id(p): tree_bytes(p.grad) for p in held}.values()))

        for parameter in built.model.parameters():
            parameter.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]
        ready = fused.begin if fused else None
        micro_step(family, built.model, batch("sana", 2), OBJECTIVE, precision, 2, ready)
        most[fuse] = max(peaks)
    weights = sum(p.nbytes for p in built.trainable.values())
    assert most[False] == weights
    assert most[True] <= max(p.nbytes for p in built.trainable.values())


def test_the_peak_falls_by_the_gradients() -> None:
    """Counted on real tensors, where weights are larger than activations: all gradients but one
    layer's are spared."""
    peaks = {}
    for fuse in (False, True):
        layers = [nn.Linear(256, 256, bias=False) for _ in range(8)]
        model = nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(model.named_parameters(), foreach=False)
        fused = FusedBackward(model, dict(model.named_parameters()), optimizer) if fuse else None
        inputs = torch.ones(1, 256)

        def step(
            mark: object,
            model: nn.Module = model,
            optimizer: torch.optim.Optimizer = optimizer,
            fused: FusedBackward | None = fused,
            inputs: torch.Tensor = inputs,
        ) -> None:
            losses = model(inputs).square().mean(1)
            if fused:
                fused.begin(losses.detach())
            losses.sum().backward()
            norm = fused.finish() if fused else gradient_norm(model.parameters())
            if not fused:
                update(optimizer, norm, 0.0)

        step(None)  # the optimizer's state is there from now on
        held = {"weights": model.parameters(), "optimizer": state_tensors(optimizer)}
        peaks[fuse] = measure(step, CPU, {**held, "batch": [inputs]}).peak
    layer = layers[0].weight.nbytes
    # And one more: the ordinary step holds the last layer's denominator while it makes the next.
    assert peaks[False] - peaks[True] == pytest.approx(8 * layer, rel=0.01)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny("sana", tmp_path_factory.mktemp("sana"))


@pytest.fixture
def plan(base, tmp_path):
    made_plan = tiny_plan("sana", base, draw_data(tmp_path / "data"), tmp_path / "run", steps=6)[0]
    plain = evolve(made_plan.optimizer, fused=False)
    return evolve(made_plan, max_grad_norm=0.0, ema=None, optimizer=plain)


def fused_of(plan) -> Trained:
    trained = trained_of(plan)
    fused = FusedBackward(trained.model, trained.parameters, trained.optimizer)
    return evolve(trained, fused=fused)


def test_the_loop_updates_once(plan):
    plain, fused = trained_of(plan), fused_of(plan)
    for step in range(3):
        rows = [one_update(plan, t, window_of(step, [(0, 1)])) for t in (plain, fused)]
        assert rows[0].loss == rows[1].loss
        assert rows[0].grad_norm.item() == pytest.approx(rows[1].grad_norm.item(), rel=1e-6)
    assert all(torch.equal(p, fused.parameters[n]) for n, p in plain.parameters.items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_updates_nothing(plan, bad):
    trained = fused_of(plan)
    before = weights(trained)
    with pytest.raises(RunFailed, match=r"step 1: loss .*weights were not updated"):
        one_update(plan, trained, window_of(0, [(0,)], scale=bad))
    assert all(torch.equal(p, before[n]) for n, p in trained.parameters.items())
    assert not trained.optimizer.state


def test_nothing_is_updated_after_a_bad_gradient(plan):
    """Weights before it in the backward pass have moved, and the message says so."""
    trained = fused_of(plan)
    names = list(trained.parameters)
    own = dict(trained.model.named_parameters())
    middle = names[len(names) // 2]
    own[middle].register_hook(lambda gradient: gradient * math.inf)
    before = weights(trained)
    with pytest.raises(RunFailed, match=r"gradient norm .*some weights were updated before"):
        one_update(plan, trained, window_of(0, [(0,)]))
    moved = {n for n, p in trained.parameters.items() if not torch.equal(p, before[n])}
    assert middle not in moved and 0 < len(moved) < len(names)
    assert all(torch.isfinite(p).all() for p in trained.parameters.values())


def test_an_accelerator_is_told_not_asked(tiny_sana, monkeypatch):
    """The flags that a fused kernel heeds, seen on the processor's own fused kernel."""
    family, built = made(tiny_sana, LORA)
    optimizer = optimizer_of("adamw", built, fused=True)
    fused = FusedBackward(built.model, built.trainable, optimizer)
    monkeypatch.setattr(FusedBackward, "_by_flag", lambda self, tensor: True)
    before = {n: p.detach().clone() for n, p in built.trainable.items()}
    for scale, moves in ((math.nan, False), (1.0, True)):

        def begin(losses: torch.Tensor, scale: float = scale) -> None:
            fused.begin(losses * scale)

        micro_step(family, built.model, batch("sana", 1), OBJECTIVE, FP32, 1, begin)
        fused.finish()
        moved = any(not torch.equal(p, before[n]) for n, p in built.trainable.items())
        assert moved is moves


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "stableadamw"])
def test_it_runs_on_meta_tensors(folder: Path, name: str) -> None:
    """As the memory simulation runs it, with the kernels of an accelerator."""
    needs(name)
    family, model = family_of(folder.name), tiny_model(folder.name, folder)
    meta = torch.device("meta")
    built = build(model, LORA, MIXED, Layout(), family, meta, empty=True, seed=0)
    facts = OPTIMIZERS[name]
    chosen = Optimizer(
        name=name, lr=1e-3, arguments=dict(facts.defaults), fused="cuda" in facts.fused
    )
    with as_on("cuda"):
        optimizer = simulated(chosen, built.trainable.items(), torch.device("cuda"))
        fused = FusedBackward(built.model, built.trainable, optimizer)
        example = family.example_batch(model, 64, 64, 2, Text(max_length=32, instruction=()), meta)
        for _ in range(2):
            micro_step(family, built.model, example, OBJECTIVE, MIXED, 2, fused.begin)
            assert fused.finish().is_meta
    assert len(optimizer.state) == len(built.trainable)
    assert all(p.grad is None for p in built.trainable.values())
