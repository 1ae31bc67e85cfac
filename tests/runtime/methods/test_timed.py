"""T-LoRA: ranks by the paper's formula, in all families, and drawn by Diffusers with the lines that
the documentation has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from attrs import evolve
from torch import Tensor, nn

from compiler.families import FAMILIES
from compiler.plan import Layout, Ranked
from runtime.build import Built, build
from runtime.events import Silent
from runtime.execute import execute
from runtime.export.request import Refused, chosen, requested
from runtime.families import family_of
from runtime.methods.timed import ByNoise, Mask
from runtime.step import micro_step
from tests.runtime.methods.test_kinds import adapter_of, apart
from tests.runtime.methods.test_methods import FP32
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.tiny import make_tiny, tiny_model

CPU = torch.device("cpu")
RANK, LEAST = 6, 2
OTHER = (Ranked(pattern=r".*(to_k|linear_1)", rank=4),)


def of_paper(t: float, rank: int, least: int = LEAST) -> int:
    """The published rule, of a time of 1000."""
    return int((1000 - t) * (rank - least) / 1000) + least


def test_the_rank_is_the_paper_s_at_every_time_of_a_table() -> None:
    mask = Mask(11)
    by_noise = ByNoise(FAMILIES["sd"], 1, "timestep", 1, {11: mask})
    by_noise(nn.Identity(), (), {"timestep": torch.arange(1000)})
    assert mask.shown is not None and mask.shown.shape == (1000, 11)
    assert mask.shown.sum(1).tolist() == [of_paper(t, 11, 1) for t in range(1000)]
    assert bool((mask.shown[:, :-1] >= mask.shown[:, 1:]).all()), "the first ranks are shown"
    by_noise(nn.Identity(), (None, torch.tensor(500)), {})
    assert mask.shown.shape == (1, 11) and int(mask.shown.sum()) == 6


def made(family: str, folder: Path, **changes: Any) -> tuple[Any, Any, Built]:
    """A tiny base with a T-LoRA as if trained."""
    own = evolve(adapter_of("lora", family), rank=RANK, min_rank=LEAST, **changes)
    of, model = family_of(family), tiny_model(family, folder)
    built = build(model, own, FP32, Layout(), of, CPU, empty=False, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.trainable.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return of, model, built


def batch_of(family: Any, model: Any, plan: Any, sigmas: Tensor) -> Any:
    batch = family.example_batch(model, 64, 64, len(sigmas), plan.text, CPU)
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    text = {
        k: drawn(t) if t.is_floating_point() and t.ndim > 2 else t for k, t in batch.text.items()
    }
    return evolve(
        batch, noise=drawn(batch.noise), latents=drawn(batch.latents), sigmas=sigmas, text=text
    )


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_each_sample_has_its_rank(name: str, tmp_path: Path) -> None:
    """As a LoRA cut by hand to the rank of its noise level: in a batch of two as alone."""
    make_tiny(name, tmp_path / name)
    family, model, built = made(name, tmp_path / name, ranks=())
    built.model.eval()
    draw_data(tmp_path / "dog", ((64, 64),))
    plan, _ = tiny_plan(name, tmp_path / name, tmp_path / "dog", tmp_path / "run")
    sigmas = torch.tensor([0.9, 0.25])  # times 900 and 250, or 899 and 249 of a table
    ranks = [of_paper(1000 * float(s), RANK) for s in sigmas]
    assert ranks == [2, 5]
    batch, uncut = batch_of(family, model, plan, sigmas), cut(name, tmp_path / name, built, RANK)
    with torch.no_grad():
        found = family.predict(built.model, batch.latents, sigmas, batch.text)
        for number, rank in enumerate(ranks):
            alone = batch.parts(1)[number]
            given = (alone.latents, alone.sigmas, alone.text)
            one = family.predict(built.model, *given)
            assert apart(one, found[number : number + 1]) < 2e-5
            expected = family.predict(cut(name, tmp_path / name, built, rank), *given)
            assert apart(one, expected) < 2e-5
            whole = family.predict(uncut, *given)
            assert apart(one, whole) > 1e-5, "a mask that hides nothing proves nothing"


def cut(name: str, folder: Path, built: Built, rank: int) -> nn.Module:
    """A LoRA without mask of the same weights, its second matrix zero from `rank` on."""
    own = evolve(adapter_of("lora", name), rank=RANK)
    of, model = family_of(name), tiny_model(name, folder)
    other = build(model, own, FP32, Layout(), of, CPU, empty=False, seed=3)
    with torch.no_grad():
        for key, parameter in other.trainable.items():
            parameter.copy_(built.trainable[key])
            if "lora_B" in key:
                parameter[:, rank:] = 0
    return other.model.eval()


def test_gradients_with_recomputation_are_those_without(tmp_path: Path) -> None:
    make_tiny("sana", tmp_path / "sana")
    draw_data(tmp_path / "dog", ((64, 64),))
    plan, _ = tiny_plan("sana", tmp_path / "sana", tmp_path / "dog", tmp_path / "run")
    family, model, built = made("sana", tmp_path / "sana", ranks=OTHER)
    own = built.adapter
    gradients = []
    for layout in (Layout(), Layout(activation_checkpointing=1, offload_blocks=2)):
        one = build(model, own, FP32, layout, family, CPU, empty=False, seed=3)
        with torch.no_grad():
            for key, parameter in one.trainable.items():
                parameter.copy_(built.trainable[key])
        batch = batch_of(family, model, plan, torch.tensor([0.95, 0.9]))
        micro_step(family, one.model, batch, plan.objective, FP32, 2)
        gradients.append({n: p.grad for n, p in one.trainable.items() if p.grad is not None})
    first, second = gradients
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    rows = {name: each for name, each in first.items() if "lora_A" in name}
    assert all(not each[LEAST:].any() for each in rows.values()), "both have the least rank"
    assert all(each[:LEAST].any() for each in rows.values())


@pytest.mark.parametrize("name", ["sana", "sd"])
def test_diffusers_draws_it_with_the_documentation_s_lines(name: str, tmp_path: Path) -> None:
    from tests.runtime.families.test_sd import objective

    make_tiny(name, tmp_path / name)
    draw_data(tmp_path / "dog", ((64, 64),) * 3)
    own = evolve(adapter_of("lora", name), rank=16, alpha=16.0, min_rank=1)
    own = evolve(own, targets=family_of(name).card.target_sets["attention"])
    changes: dict[str, Any] = {} if name == "sana" else {"objective": objective()}
    folders = (tmp_path / name, tmp_path / "dog", tmp_path / "run")
    plan, manifest = tiny_plan(name, *folders, steps=3, adapter=own, lr=3e-1, **changes)
    assert execute(plan, manifest, Silent()).status == "finished"
    for wish in ({"merge": True}, {"resize": "4"}):
        with pytest.raises(Refused, match="min_rank"):
            requested(chosen(tmp_path / "run"), **wish)  # type: ignore[arg-type]
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name)
    pipeline.load_lora_weights(tmp_path / "run" / "lora")
    pipeline.set_progress_bar_config(disable=True)
    start = evolve(own, start=str(tmp_path / "run/lora/pytorch_lora_weights.safetensors"))
    of, model = family_of(name), tiny_model(name, tmp_path / name)
    built = build(model, start, FP32, Layout(), of, CPU, empty=False, seed=3)
    ours: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name)
    setattr(ours, of.card.trained_component, built.model.eval())
    ours.set_progress_bar_config(disable=True)
    without = drawn(pipeline, name)
    page = (Path(__file__).parents[3] / "docs/files.md").read_text(encoding="utf-8")
    found = re.search(r"(    model, rank, least = .*?)\n\nFlux", page, re.DOTALL)
    assert found is not None
    lines = re.sub(r"^    ", "", found[1], flags=re.MULTILINE)
    if name == "sd":
        lines = lines.replace("pipeline.transformer", "pipeline.unet")
    exec(lines, {"pipeline": pipeline, "torch": torch})
    expected = drawn(ours, name)
    assert apart(drawn(pipeline, name), expected) < 1e-4
    assert apart(without, expected) > 1e-2


def drawn(pipeline: Any, name: str) -> Tensor:
    options = {"use_resolution_binning": False} if name == "sana" else {}
    found = pipeline(
        "a dog",
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    )
    latents: Tensor = found.images
    return latents
