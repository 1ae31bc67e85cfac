"""Projections by one product: against the model as it is written, family by family."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from attrs import evolve
from torch import Tensor, nn

from compiler.adapters import ADAPTERS, INVERSION, AdapterKind
from compiler.families import FAMILIES
from compiler.plan import Layout, Speed
from runtime.build import Built, build, state
from runtime.events import Silent
from runtime.execute import execute
from runtime.families import family_of
from runtime.fused_backward import FusedBackward
from runtime.fused_projections import Group, fuse, sharing_input
from runtime.step import micro_step
from tests.compiler.recipes import MACHINE, compiled, make_pictures
from tests.runtime.memory_cases import small
from tests.runtime.replay import FP32, OBJECTIVE
from tests.runtime.test_memory_exact import check
from tests.runtime.test_speed import alike, made, train
from tests.runtime.test_step import LORA, MIXED, batch
from tests.runtime.tiny import make_tiny
from tests.test_matrix import CASES, RECIPE, KillAfter, Killed, weights

CPU = torch.device("cpu")
FUSED = Speed(fused_projections=True)
PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


class Counted:
    """Products of projections: how many were made together, and how many alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.together = self.alone = 0
        stock, whole = nn.Linear.forward, Group._together

        def alone(layer: nn.Linear, given: Tensor) -> Tensor:
            self.alone += layer in self.layers
            return stock(layer, given)

        def together(group: Group, given: Tensor) -> tuple[Tensor, ...]:
            self.together += 1
            return whole(group, given)

        self.layers: set[nn.Module] = set()
        monkeypatch.setattr(nn.Linear, "forward", alone)
        monkeypatch.setattr(Group, "_together", together)


def model_of(name: str) -> tuple[Any, Built]:
    """The family's model, small, with weights that are functions of their place."""
    step, family = small(name), family_of(name)
    built = build(step.model, None, FP32, Layout(), family, CPU, empty=True, seed=0)
    with torch.no_grad():
        tables = dict(built.model.named_buffers()).values()  # of places: made when it is loaded
        for number, weight in enumerate((*built.trainable.values(), *tables)):
            weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(number))
    return family, built


def example(name: str) -> Any:
    """A batch of noise for it."""
    step, torch_seed = small(name), torch.Generator().manual_seed(5)
    found = family_of(name).example_batch(step.model, 128, 192, 2, step.text, CPU)

    def drawn(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=torch_seed)

    text = {
        k: drawn(v) if v.is_floating_point() else torch.ones_like(v) for k, v in found.text.items()
    }
    return evolve(
        found,
        latents=drawn(found.latents),
        noise=drawn(found.noise),
        sigmas=torch.full_like(found.sigmas, 0.5),
        text=text,
    )


def of_one_input(model: nn.Module, run: Any) -> set[tuple[str, ...]]:
    """Projections of a module that are called with the very same tensor, as found by looking."""
    seen: dict[tuple[str, int], list[str]] = defaultdict(list)
    kept: list[Tensor] = []

    def looking(name: str) -> Any:
        def hook(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            kept.append(given[0])  # so that no other gets its address
            names = seen[name.rpartition(".")[0], id(given[0])]
            names += [name] * (name not in names)

        return hook

    hooks = [
        layer.register_forward_pre_hook(looking(name))
        for name, layer in model.named_modules()
        if name.rpartition(".")[2] in PROJECTIONS and isinstance(layer, nn.Linear)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return {tuple(names) for names in seen.values() if len(names) > 1}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_predictions_and_gradients_are_those_of_the_model_as_written(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every projection that shares its input with others is among those that are fused."""
    family, plain = model_of(name)
    given, objective = example(name), small(name).objective
    groups = of_one_input(
        plain.model, lambda: micro_step(family, plain.model, given, objective, FP32, 2)
    )
    plain.model.zero_grad()
    expected = micro_step(family, plain.model, given, objective, FP32, 2)
    _, quick = model_of(name)
    names = {id(layer): name for name, layer in quick.model.named_modules()}
    taken = {
        tuple(names[id(layer)] for layer in layers)
        for layers in sharing_input(quick.model, family.card.cross_attention)
    }
    assert taken == groups
    counted = Counted(monkeypatch)
    counted.layers = {
        layer
        for layer in quick.model.modules()
        if names[id(layer)] in {one for group in groups for one in group}
    }
    assert fuse(quick.model, family.card.cross_attention) == len(groups)
    found = micro_step(family, quick.model, given, objective, FP32, 2)
    assert (counted.together, counted.alone) == (len(groups), 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for label, weight in plain.trainable.items():
        other = quick.trainable[label].grad
        assert (weight.grad is None) == (other is None), label
        if weight.grad is not None:
            torch.testing.assert_close(other, weight.grad, rtol=1e-4, atol=1e-6)


KINDS = [kind for kind, row in ADAPTERS.items() if kind != INVERSION and not row.turns_input]


def moved(built: Built) -> None:
    """Adapters that start at nothing would show nothing."""
    with torch.no_grad():
        for number, weight in enumerate(built.trainable.values()):
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            weight.add_(drawn, alpha=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_adds_its_adapter_to_its_part(
    kind: AdapterKind, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = evolve(LORA, kind=kind, block_size=2 if kind == "dylora" else 0)
    family, plain = made(tiny_sd3, adapter)
    moved(plain)
    start = {n: p.clone() for n, p in state(plain).items()}
    expected = train(family, plain, (2, 1))
    counted = Counted(monkeypatch)
    _, quick = made(tiny_sd3, adapter, FUSED)
    moved(quick)
    counted.layers = {
        m
        for n, m in quick.model.named_modules()
        if set(PROJECTIONS) & set(n.split(".")) and type(m) is nn.Linear and "lora" not in n
    }
    torch.testing.assert_close(train(family, quick, (2, 1)), expected, rtol=1e-5, atol=1e-6)
    assert counted.together > 0 == counted.alone
    alike(plain, quick, start, 1e-4)


def test_some_adapters_give_each_layer_another_input(tiny_sd3: Path) -> None:
    """These are refused; a layer whose input is not the first one's still computes what it did."""
    adapter = evolve(LORA, kind="oft", rank=0, block_size=4)
    family, plain = made(tiny_sd3, adapter)
    _, quick = made(tiny_sd3, adapter, FUSED)
    moved(plain)
    moved(quick)
    torch.testing.assert_close(train(family, quick, (2,)), train(family, plain, (2,)))


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("precision", [FP32, MIXED], ids=["fp32", "masters"])
def test_training_all_weights(every: int, precision: Any, tiny_sana: Path) -> None:
    """Recomputed or not, with or without masters, and with an optimizer of whole matrices."""
    how = {"precision": precision, "layout": Layout(activation_checkpointing=every)}
    family, plain = made(tiny_sana, **how)
    _, quick = made(tiny_sana, None, FUSED, **how)
    assert list(quick.trainable) == list(plain.trainable)
    start = {n: p.clone() for n, p in state(plain).items()}
    expected = train(family, plain, (2, 1, 2), precision)
    found = train(family, quick, (2, 1, 2), precision)
    exact = precision is FP32
    torch.testing.assert_close(found, expected, rtol=1e-5 if exact else 2e-2, atol=1e-6)
    alike(plain, quick, start, 1e-4 if exact else 0.1)


def test_updates_in_the_backward_pass(tiny_sana: Path) -> None:
    """A weight may change as soon as its gradient is there: no product that needs it is left."""
    found = []
    for speed in (Speed(), FUSED):
        family, built = made(tiny_sana, None, speed)
        optimizer = torch.optim.SGD(built.trainable.values(), lr=0.01)
        fused = FusedBackward(built.model, built.trainable, optimizer)
        start = {n: p.clone() for n, p in state(built).items()}
        for step in range(2):
            micro_step(family, built.model, batch("sana", 2, step), OBJECTIVE, FP32, 2, fused.begin)
            fused.finish()
        found.append(built)
    plain, quick = found
    alike(plain, quick, start, 1e-4)


@pytest.mark.parametrize("family", ["sana", "sd3"])
@pytest.mark.parametrize(
    "how",
    [
        {"compute": "bfloat16", "trained": "float32", "checkpointing": 1},
        {"checkpointing": 0},
        {"rank": 4, "checkpointing": 2},
    ],
    ids=["masters", "full", "lora"],
)
def test_memory_is_simulated_as_it_is(family: str, how: dict[str, Any]) -> None:
    check(evolve(small(family, **how), fused_projections=True))


def test_a_weight_that_was_moved_away_is_noticed(tiny_sana: Path) -> None:
    family, built = made(tiny_sana, None, FUSED)
    weight = built.model.get_parameter("transformer_blocks.0.attn1.to_k.weight")
    weight.data = weight.data.clone()
    with pytest.raises(AssertionError, match="moved"):
        train(family, built, (1,))


@pytest.mark.parametrize("case", ["lora", "full", "full-bf16"])
def test_a_run_goes_on_and_saves_what_diffusers_loads(case: str, tmp_path: Path) -> None:
    """Killed and gone on with bit for bit; the result is laid out as ever."""
    make_tiny("sd3", tmp_path / "base")
    make_pictures(tmp_path / "pictures", [(64, 64), (80, 64), (64, 96)])
    adapter, compute, checkpointing = CASES[case]

    def run(name: str, *kill: int, fused: bool) -> dict[str, Tensor]:
        text = RECIPE.format(
            name=name,
            family="sd3",
            adapter=adapter,
            compute=compute,
            checkpointing=checkpointing,
            drawing="steps = 2",
        )
        (tmp_path / "recipe.toml").write_text(text)
        asked = f"speed.fused_projections={str(fused).lower()}"
        result = compiled(tmp_path / "recipe.toml", asked, machine=MACHINE)
        assert result.plan is not None and result.manifest is not None, result.diagnostics
        assert result.plan.speed == Speed(fused_projections=fused)
        for after in kill:
            with pytest.raises(Killed):
                execute(result.plan, result.manifest, KillAfter(after))
        assert execute(result.plan, result.manifest, Silent()).status == "finished"
        return weights(Path(result.plan.run_folder))

    whole = run("whole", fused=True)
    halted = run("halted", 2, fused=True)
    assert all(torch.equal(tensor, halted[name]) for name, tensor in whole.items())
    plain = run("plain", fused=False)
    assert plain.keys() == whole.keys()
    for name, tensor in plain.items():
        assert tensor.shape == whole[name].shape
        torch.testing.assert_close(whole[name], tensor, rtol=1e-2, atol=1e-2)
    if case == "full":
        folder = tmp_path / "runs" / "whole" / "model" / "transformer"
        loaded = diffusers.SD3Transformer2DModel.from_pretrained(folder)
        found = {name: p.shape for name, p in loaded.named_parameters()}
        assert (
            found["transformer_blocks.0.attn.to_q.weight"]
            == (found["transformer_blocks.0.attn.to_k.weight"])
        )
