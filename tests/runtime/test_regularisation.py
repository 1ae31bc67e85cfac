"""Samples whose target is what the frozen base predicts: against a base that is loaded apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from attrs import evolve
from torch import Tensor

from compiler.plan import Layout, Objective
from compiler.quantisers import QUANTISERS
from runtime.build import Built, build, state
from runtime.data.cache import Cache
from runtime.data.feed import Feed
from runtime.events import Silent
from runtime.execute import execute
from runtime.families import family_of
from runtime.families.base import Family
from runtime.methods.frozen import adapters_off
from runtime.objective import add_noise, place_weights
from runtime.step import micro_step
from tests.runtime.methods.test_methods import MIXED, adapter_of, shake
from tests.runtime.plans import LORA, draw_data, source_of, tiny_plan
from tests.runtime.quantise.test_loading import quantised_model
from tests.runtime.replay import FP32, OBJECTIVE
from tests.runtime.test_ranks_run import assert_close, start
from tests.runtime.test_step import batch, gradients
from tests.runtime.tiny import tiny_model
from tests.runtime.whole_runs import wait

CPU = torch.device("cpu")
CLASSES = {"sana": "SanaTransformer2DModel", "sd3": "SD3Transformer2DModel"}


@pytest.fixture(params=["sana", "sd3"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


def made(folder: Path, layout: Layout | None = None, precision: Any = FP32) -> tuple[Family, Built]:
    family, model = family_of(folder.name), tiny_model(folder.name, folder)
    adapter = evolve(adapter_of(folder.name, "all-linear"), dropout=0.3)
    return family, build(
        model, adapter, precision, layout or Layout(), family, CPU, empty=False, seed=0
    )


def base_prediction(folder: Path, family: Family, b: Any) -> Tensor:
    """Of the transformer as Diffusers loads it, without our build."""
    kind: Any = getattr(diffusers, CLASSES[folder.name])
    base = kind.from_pretrained(folder / "transformer").eval()
    with torch.no_grad():
        noisy = add_noise(b.latents, b.noise, b.sigmas)
        found: Tensor = family.predict(base, noisy, b.sigmas, b.text)
    return found


HUBER = evolve(OBJECTIVE, loss="huber", delta=0.1, delta_schedule="constant")
WEIGHTED = evolve(OBJECTIVE, weighting="diffusers-compat")


@pytest.mark.parametrize("objective", [OBJECTIVE, HUBER, WEIGHTED], ids=["mse", "huber", "sigma2"])
def test_the_loss_in_float64(folder: Path, objective: Objective) -> None:
    family, built = made(folder)
    shake(built)
    shown = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = batch(folder.name, 3)
    kept = evolve(
        plain,
        keeps_base=True,
        weights=torch.tensor([0.5, 1.0, 2.0]),
        mask=place_weights(shown, 0.2),
    )
    torch.manual_seed(5)
    losses = micro_step(family, built.model, kept, objective, FP32, 3)
    noisy = add_noise(kept.latents, kept.noise, kept.sigmas)
    torch.manual_seed(5)  # of the adapter's dropout, which the base's pass does not draw from
    ours = family.predict(built.model, noisy, kept.sigmas, kept.text).detach().double()
    error = ours - base_prediction(folder, family, kept).double()
    squared = error**2
    if objective is HUBER:
        squared = 2 * 0.1 * (torch.sqrt(squared + 0.01) - 0.1)
    if objective is WEIGHTED:
        squared = squared * kept.sigmas.double()[:, None, None, None] ** 2
    weights = 0.2 + 0.8 * shown.double()
    expected = (weights * squared.mean(1)).sum((1, 2)) / weights.sum((1, 2))
    expected *= torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-4, atol=1e-9)
    assert losses.min() > 0


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(activation_checkpointing=1),
        Layout(offload_blocks=99),
        Layout(offload_blocks=1, activation_checkpointing=2, offload_activations=True),
    ],
)
def test_gradients_by_autograd(folder: Path, layout: Layout) -> None:
    """Of the plain expression with the base's prediction as a constant, whatever waits where."""
    family, built = made(folder, layout)
    shake(built)
    kept = evolve(batch(folder.name, 3), keeps_base=True)
    torch.manual_seed(5)
    micro_step(family, built.model, kept, OBJECTIVE, FP32, 3)
    found = gradients(built)
    reference = made(folder)[1]
    with torch.no_grad():
        for name, value in state(built).items():
            reference.trainable[name].copy_(value)
    noisy = add_noise(kept.latents, kept.noise, kept.sigmas)
    torch.manual_seed(5)
    ours = family.predict(reference.model, noisy, kept.sigmas, kept.text)
    loss = ((ours - base_prediction(folder, family, kept)) ** 2).mean()
    expected = torch.autograd.grad(loss, list(reference.trainable.values()))
    for name, gradient in zip(reference.trainable, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-8)
    assert all(p.requires_grad for p in built.trainable.values())


@pytest.mark.parametrize("precision", [FP32, MIXED], ids=["fp32", "mixed"])
@pytest.mark.parametrize("kind", ["", *QUANTISERS])
def test_an_untouched_adapter_learns_nothing(folder: Path, kind: str, precision: Any) -> None:
    family, model = family_of(folder.name), tiny_model(folder.name, folder)
    if kind:
        model = quantised_model(folder, "transformer", kind)  # type: ignore[arg-type]
    adapter = adapter_of(folder.name, "all-linear")
    built = build(model, adapter, precision, Layout(), family, CPU, empty=False, seed=0)
    kept = evolve(batch(folder.name, 2), keeps_base=True)
    losses = micro_step(family, built.model, kept, OBJECTIVE, precision, 2)
    assert losses.tolist() == [0.0, 0.0]
    assert all(g.abs().max() == 0 for g in gradients(built).values()) and gradients(built)


def test_parts_and_what_a_plain_batch_costs(folder: Path) -> None:
    family, built = made(folder)
    passes: list[bool] = []
    built.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    whole = batch(folder.name, 4)
    for part in whole.parts(2):
        micro_step(family, built.model, part, OBJECTIVE, FP32, 4)
    assert passes == [True, True]
    for part in evolve(whole, keeps_base=True).parts(3):
        micro_step(family, built.model, part, OBJECTIVE, FP32, 4)
    assert passes[2:] == [False, True, False, True]


def test_a_model_without_adapter_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no adapter"), adapters_off(torch.nn.Linear(2, 2)):
        pass


def test_a_run_of_both_kinds(tmp_path: Path, tiny_sana: Path) -> None:
    """Batches of the class, and only these, keep the base; weights come out as of one run."""
    sources = [
        source_of(draw_data(tmp_path / "dog", [(70, 70)] * 3)),
        evolve(
            source_of(draw_data(tmp_path / "class", [(70, 70)] * 4), prompt="a dog"),
            regularisation=True,
            target="base",
            loss_weight=0.5,
        ),
    ]
    plan, manifest = tiny_plan(
        "sana", tiny_sana, sources, tmp_path / "run", adapter=LORA, steps=4, accumulate=2
    )
    outcome = execute(plan, manifest, Silent())
    assert outcome.status == "finished"
    feed = Feed(plan, manifest, family_of("sana"), Cache(Path(plan.cache_folder)), CPU)
    names = [manifest.name(row) for row in range(len(manifest))]
    assert sum(name.startswith("class/") for name in names) == 4
    seen = set()
    for step in range(4):
        window, at = feed.window(step), 0
        for one in window.batches:
            mine = window.names[at : at + len(one.latents)]
            at += len(mine)
            assert {name.startswith("class/") for name in mine} == {one.keeps_base}
            seen.add(one.keeps_base)
    assert seen == {True, False}


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_two_processes_train_as_one_does(tmp_path: Path, tiny_sd3: Path) -> None:
    """One rank may ask the base in a step in which the other one does not."""
    sources = [
        source_of(draw_data(tmp_path / "dog", [(70, 70)] * 3)),
        evolve(
            source_of(draw_data(tmp_path / "class", [(70, 71)] * 5), prompt="a dog"), target="base"
        ),
    ]
    settings: dict[str, Any] = {"steps": 4, "accumulate": 2, "adapter": evolve(LORA, dropout=0.2)}
    alone, manifest = tiny_plan("sd3", tiny_sd3, sources, tmp_path / "alone", **settings)
    together = evolve(
        alone,
        name="together",
        run_folder=str(tmp_path / "together"),
        steps=evolve(alone.steps, ranks=2, accumulate=1),
    )
    assert [wait(pid) for pid in start([(together, manifest)], 2)] == [0, 0]
    execute(alone, manifest, Silent())
    assert_close(together, alone, 1e-5)
