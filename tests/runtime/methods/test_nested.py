"""DyLoRA: by the paper's formula, as LyCORIS has it, and cut to a smaller rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

from compiler.plan import Adapter, Layout, Ranked
from runtime.build import Built, build
from runtime.events import Silent
from runtime.execute import execute
from runtime.export.export import export
from runtime.export.request import Refused, chosen, requested
from runtime.families import family_of
from runtime.methods.nested import Nested, nest
from runtime.step import micro_step
from tests.runtime.methods.test_kinds import adapter_of, apart, by_diffusers, by_peft, output
from tests.runtime.methods.test_methods import FP32
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.tiny import make_tiny, tiny_model

CPU = torch.device("cpu")
RANK, BLOCK, ALPHA = 6, 2, 3.0


def adapter(**changes: Any) -> Adapter:
    found = Adapter(
        kind="dylora",
        rank=RANK,
        alpha=ALPHA,
        dropout=0.0,
        init="gaussian",
        targets=("layer",),
        block_size=BLOCK,
    )
    return evolve(found, **changes)


def one_layer(layer: nn.Module, facts: Adapter) -> tuple[Any, Nested]:
    """A DyLoRA on one layer, in float64, with weights as if trained."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("layer", layer)
    config = LoraConfig(
        r=facts.rank,
        lora_alpha=facts.alpha,
        use_rslora=facts.scaling == "sqrt-rank",
        target_modules="layer",
    )
    inject_adapter_in_model(config, model)
    nested = nest(model, facts, ["layer"])
    adapted: Any = model.get_submodule("layer").double()
    nn.init.normal_(adapted.lora_B["default"].weight)
    return adapted, nested


def step_of(nested: Nested, rank: int) -> int:
    """A step of that rank."""
    for step in range(200):
        nested.begin(0, step)
        (level,) = nested._levels.values()
        assert level.shares is not None
        if int((level.shares > 0).sum()) == rank:
            return step
    raise AssertionError("no step has this rank")


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "convolution": (lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1), (2, 5, 6, 6)),
}


@pytest.mark.parametrize("scaling", ["rank", "sqrt-rank"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_a_step_has_the_first_ranks_and_trains_the_last_block_of_them(
    kind: str, scaling: Any, rank: int
) -> None:
    """Equations 6 and 8 of the paper, written out."""
    make, shape = LAYERS[kind]
    layer, nested = one_layer(make(), adapter(scaling=scaling))
    step_of(nested, rank)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    scale = ALPHA / (rank if scaling == "rank" else rank**0.5)
    rows, columns = (each.detach().clone().flatten(1).requires_grad_() for each in (a, b))
    frozen = rank - BLOCK
    down = torch.cat([rows[:frozen].detach(), rows[frozen:rank]])
    up = torch.cat([columns[:, :frozen].detach(), columns[:, frozen:rank]], dim=1)
    base = layer.base_layer
    weight = base.weight + scale * (up @ down).view(base.weight.shape)
    other = x.detach().clone().requires_grad_()
    if kind == "linear":
        expected = nn.functional.linear(other, weight, base.bias)
    else:
        expected = nn.functional.conv2d(other, weight, base.bias, 2, 1)
    found = layer(x)
    limit = 1e-12 if scaling == "rank" else 2e-6  # a root is rounded to float32
    assert apart(found.detach(), expected.detach()) < limit
    direction = torch.randn_like(found)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    assert x.grad is not None and other.grad is not None and rows.grad is not None
    assert apart(x.grad, other.grad) < limit
    assert apart(a.grad.flatten(1), rows.grad) < limit
    assert apart(b.grad.flatten(1), columns.grad) < limit
    idle = [number for number in range(RANK) if not frozen <= number < rank]
    assert not a.grad[idle].any() and not b.grad[:, idle].any()
    assert a.grad[frozen:rank].any() and b.grad[:, frozen:rank].any()


@pytest.mark.parametrize("block", [1, 2, 3])
def test_it_is_lycoris_own(block: int) -> None:
    """Update and gradients of every rank; LyCORIS' scale is alpha over the number of blocks."""
    from lycoris.modules.dylora import DyLoraModule

    layer, nested = one_layer(nn.Linear(5, 7), adapter(block_size=block))
    theirs = DyLoraModule("x", nn.Linear(5, 7), lora_dim=RANK, alpha=ALPHA, block_size=block)
    theirs.double()
    a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    with torch.no_grad():
        for number, (up, down) in enumerate(zip(theirs.up_list, theirs.down_list, strict=True)):
            up.copy_(b[:, number * block : (number + 1) * block])
            down.copy_(a[number * block : (number + 1) * block])
    eye = torch.eye(5, dtype=torch.float64)
    for number in range(RANK // block):
        step_of(nested, (number + 1) * block)
        ours = (layer(eye) - layer.base_layer(eye)).T * block
        update, _ = theirs.get_diff_weight(rank=number * block)
        assert apart(ours.detach(), update.detach()) < 1e-6  # their alpha is float32
        for each in (a, b, *theirs.up_list, *theirs.down_list):
            each.grad = None
        ours.square().sum().backward()
        update.square().sum().backward()
        mine = slice(number * block, (number + 1) * block)
        assert apart(a.grad[mine], theirs.down_list[number].grad) < 1e-5
        assert apart(b.grad[:, mine], theirs.up_list[number].grad) < 1e-5
        others = [each for n, each in enumerate(theirs.down_list) if n != number]
        assert all(each.grad is None for each in others)


def test_ranks_are_drawn_evenly_by_seed_and_step() -> None:
    _, nested = one_layer(nn.Linear(5, 7), adapter())
    drawn = []
    for step in range(600):
        nested.begin(5, step)
        (level,) = nested._levels.values()
        assert level.shares is not None and level.newest is not None
        drawn.append(int((level.shares > 0).sum()))
        assert int(level.newest.sum()) == BLOCK
    assert {rank: drawn.count(rank) > 150 for rank in drawn} == {2: True, 4: True, 6: True}
    _, again = one_layer(nn.Linear(5, 7), adapter())
    torch.manual_seed(9)  # no generator of torch's is asked
    before = torch.get_rng_state()
    for step in (599, 3, 3):
        again.begin(5, step)
        (level,) = again._levels.values()
        assert level.shares is not None and int((level.shares > 0).sum()) == drawn[step]
    assert torch.equal(torch.get_rng_state(), before)
    again.begin(6, 0)


@torch.no_grad()
def test_out_of_training_it_is_a_lora() -> None:
    layer, nested = one_layer(nn.Linear(5, 7), adapter())
    step_of(nested, 2)
    x = torch.randn(3, 5, dtype=torch.float64)
    base, (a, b) = layer.base_layer, (layer.lora_A["default"], layer.lora_B["default"])
    expected = base(x) + ALPHA / RANK * x @ a.weight.T @ b.weight.T
    assert apart(layer.eval()(x), expected) < 1e-12
    assert apart(layer.train()(x), expected) > 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, and pictures."""
    root = tmp_path_factory.mktemp("nested")
    make_tiny("sana", root / "sana")
    draw_data(root / "dog", ((64, 64),) * 3)
    return root


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_what_is_recomputed_has_the_same_rank(folder: Path, quantize: Any) -> None:
    """Gradients with checkpointing and blocks on the host are those without, bit for bit."""
    family, model = family_of("sana"), tiny_model("sana", folder / "sana")
    parts = tuple(evolve(p, quantize=quantize) if p.trained else p for p in model.components)
    model = evolve(model, components=parts)
    own = adapter_of("dylora", "sana", ranks=(Ranked(pattern=".*to_q", rank=8),))

    def gradients(layout: Layout) -> dict[str, Tensor]:
        made = build(model, own, FP32, layout, family, CPU, empty=False, seed=3)
        shake(made)
        plan, _ = tiny_plan("sana", folder / "sana", folder / "dog", folder / "none")
        batch = family.example_batch(model, 64, 64, 2, plan.text, CPU)
        (nested,) = made.nested
        nested.begin(3, 1)
        micro_step(family, made.model, batch, plan.objective, FP32, 2)
        return {n: p.grad for n, p in made.trainable.items() if p.grad is not None}

    whole = gradients(Layout())
    assert any(tensor.any() for tensor in whole.values())
    idle = [name for name, tensor in whole.items() if (tensor.flatten(1) == 0).all(1).any()]
    assert len(idle) >= len(whole) // 2, "no more than a block of A's rows is trained"
    again = gradients(Layout(activation_checkpointing=1, offload_blocks=2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


@torch.no_grad()
def shake(built: Built) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in built.trainable.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


@pytest.mark.parametrize("scaling", ["rank", "sqrt-rank"])
def test_a_file_is_cut_to_what_a_step_of_that_rank_computes(
    folder: Path, scaling: Any, tmp_path: Path
) -> None:
    """In Diffusers, peft and sd-scripts' scale; and only to ranks that were trained."""
    changes = {"scaling": scaling, "ranks": (Ranked(pattern=".*to_q", rank=2),)}
    own = adapter_of("dylora", "sana", **changes)
    plan, manifest = tiny_plan(
        "sana", folder / "sana", folder / "dog", tmp_path / "run", steps=4, adapter=own, lr=3e-2
    )
    assert execute(plan, manifest, Silent()).status == "finished"
    weights = chosen(tmp_path / "run")
    small = export(requested(weights, resize="2", out=tmp_path / "small" / NAME))
    held = load_file(small)
    assert {tensor.shape[0] for name, tensor in held.items() if "lora_A" in name} == {2}
    found = output(by_diffusers(folder / "sana", small.parent), "sana")
    whole = output(by_diffusers(folder / "sana", tmp_path / "run" / "dylora"), "sana")
    assert apart(found, whole) > 1e-4
    peft = export(requested(weights, resize="2", format="peft", out=tmp_path / "peft"))
    assert apart(output(by_peft(folder / "sana", peft), "sana"), found) < 1e-5
    assert apart(trained_at(folder, plan, tmp_path / "run", 2), found) < 1e-5
    assert apart(trained_at(folder, plan, tmp_path / "run", 4), whole) < 1e-5
    for size in ("3", "95%"):
        with pytest.raises(Refused, match="one of the ranks that it was trained for") as told:
            requested(weights, resize=size)
        assert told.value.help == "2, 4"


NAME = "pytorch_lora_weights.safetensors"


def trained_at(folder: Path, plan: Any, run: Path, rank: int) -> Tensor:
    """What the model in training computes in a step of that rank."""
    start = evolve(plan.adapter, start=str(run / "dylora" / NAME))
    family, model = family_of("sana"), tiny_model("sana", folder / "sana")
    built = build(model, start, FP32, Layout(), family, CPU, empty=False, seed=3)
    (nested,) = built.nested
    for step in range(50):
        nested.begin(0, step)
        shares = nested._levels[plan.adapter.rank].shares
        assert shares is not None
        if int((shares > 0).sum()) == rank:
            return output(built.model, "sana")
    raise AssertionError("no step has this rank")
