"""SDXL's refiner against Diffusers: prompts, refined pictures, what it is told."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image

from compiler.compile import Compiled
from compiler.noise import trained_entries
from runtime.errors import RunFailed
from runtime.families.base import PICTURE, Framed
from runtime.families.common import encode_prompts, sample
from runtime.families.sdxl_refiner import AESTHETIC
from runtime.refined import start
from tests.compiler.recipes import codes, compiled, project
from tests.runtime.families.conformance import PROMPTS, Opened, check_parameters, opened

CPU = torch.device("cpu")
RECIPES = Path(__file__).parents[3] / "recipes"
CALL = inspect.signature(diffusers.StableDiffusionXLImg2ImgPipeline.__call__).parameters


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened("sdxl_refiner", tmp_path_factory.mktemp("refiner"))


def test_known_models_have_the_published_sizes() -> None:
    check_parameters("sdxl_refiner")


@torch.no_grad()
def test_embeddings_are_the_stock_pipeline_s(tiny: Opened) -> None:
    found = encode_prompts(tiny.family, tiny.parts, PROMPTS, tiny.text)
    other = encode_prompts(tiny.family, tiny.parts, PROMPTS, tiny.text, negative=True)
    states, negative, pooled, negative_pooled = tiny.stock.encode_prompt(
        PROMPTS, device=CPU, negative_prompt=PROMPTS
    )
    for row, (ours, theirs) in enumerate(zip(found, other, strict=True)):
        assert torch.equal(ours["encoder_hidden_states"], states[row])
        assert torch.equal(ours["text_embeds"], pooled[row])
        assert torch.equal(theirs["encoder_hidden_states"], negative[row])
        assert torch.equal(theirs["text_embeds"], negative_pooled[row])


@torch.no_grad()
def test_an_empty_negative_prompt_is_encoded(tiny: Opened) -> None:
    """As the published index says, unlike the base model's."""
    assert tiny.family.card.zeros_for_empty is False
    _, negative, _, pooled = tiny.stock.encode_prompt("a dog", device=CPU)
    (ours,) = encode_prompts(tiny.family, tiny.parts, [""], tiny.text, negative=True)
    assert torch.equal(ours["encoder_hidden_states"], negative[0]) and negative.any()
    assert torch.equal(ours["text_embeds"], pooled[0])


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_refined_pictures_are_the_stock_pipeline_s(tiny: Opened, guidance: float) -> None:
    """Bit for bit, with the pipeline's own share of the steps."""
    picture = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(3)) * 2 - 1
    expected = tiny.stock(
        PROMPTS[0],
        image=picture,
        negative_prompt="blurry",
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(7),
        num_inference_steps=10,
    ).images[0]
    encode = lambda prompt, negative: encode_prompts(  # noqa: E731
        tiny.family, tiny.parts, [prompt], tiny.text, negative=negative
    )[0]
    drawn = sample(
        tiny.family,
        {**{k: tiny.parts[k] for k in ("unet", "vae", "scheduler")}, PICTURE: picture},
        encode(PROMPTS[0], False),
        encode("blurry", True),
        width=128,
        height=64,
        guidance=guidance,
        steps=10,
        seed=7,
    )
    found, wanted = np.asarray(drawn), np.asarray(expected)
    assert wanted.std() > 1
    assert np.array_equal(found, wanted)


@torch.no_grad()
def test_it_is_told_how_pleasing_a_picture_is(tiny: Opened) -> None:
    told, _ = tiny.stock._get_add_time_ids(
        (301, 402),
        (11, 7),
        (64, 128),
        CALL["aesthetic_score"].default,
        CALL["negative_aesthetic_score"].default,
        (301, 402),
        (0, 0),
        (64, 128),
        dtype=torch.float32,
        text_encoder_projection_dim=24,
    )
    frame = Framed(original=(301, 402), crop=(11, 7), target=(64, 128))
    ours = tiny.family.size_conditions([frame])["time_ids"]
    assert torch.equal(ours.float(), told) and ours[0, -1] == AESTHETIC


def test_its_share_is_the_pipeline_s(tiny: Opened) -> None:
    assert tiny.family.card.refines == CALL["strength"].default


def test_the_picture_is_scaled_and_cut_in_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((64, 200, 3), np.uint8)
    pixels[:, 68:132] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = start(str(tmp_path / "wide.png"), 64, 64)
    assert found.shape == (1, 3, 64, 64) and bool((found == 1).all())
    assert start(str(tmp_path / "wide.png"), 192, 128).shape == (1, 3, 128, 192)
    (tmp_path / "none.png").write_bytes(b"no picture")
    with pytest.raises(RunFailed, match="can't be read"):
        start(str(tmp_path / "none.png"), 64, 64)


RECIPE = """\
name = "r"
seed = 1
output = "runs"
[model]
family = "sdxl_refiner"
base = "base"
[data]
resolution = 64
[[data.source]]
path = "pictures"
captions = {{ from = "instance", prompt = "a dog" }}
[train]
epochs = 1
optimizer = {{ name = "adamw", lr = 1e-4 }}
[validation]
prompts = {{ a = "a dog" }}
{more}
"""


def plan_with(folder: Path, more: str) -> Compiled:
    return compiled(project(folder, RECIPE.format(more=more), "sdxl_refiner"))


def test_a_recipe_names_the_picture(tmp_path: Path) -> None:
    result = plan_with(tmp_path, 'picture = "pictures/000.png"')
    assert result.plan is not None, result.diagnostics
    assert result.plan.validation.picture == str(tmp_path / "pictures/000.png")
    assert result.plan.text.zeros_for_empty is False
    assert result.plan.objective.max_sigma == 0.2, "what it was made for"
    whole = compiled(tmp_path / "recipe.toml", "train.timesteps.max=1.0").plan
    assert whole is not None and whole.objective.max_sigma == 1.0


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ("", "missing-key"),
        ('picture = "nothing.png"', "missing-path"),
        ('picture = "pictures"', "missing-path"),
        ('picture = "recipe.toml"', "broken-images"),
        ('picture = "pictures/000.png"\nsteps = 3', "out-of-range"),
    ],
)
def test_what_can_not_be_refined_is_said(tmp_path: Path, more: str, code: str) -> None:
    result = plan_with(tmp_path, more)
    assert code in codes(result) and result.plan is None


def test_others_refine_nothing(tmp_path: Path) -> None:
    recipe = RECIPE.replace("sdxl_refiner", "sdxl").format(more='picture = "pictures/000.png"')
    result = compiled(project(tmp_path, recipe, "sdxl"))
    assert "not-in-family" in codes(result)


def test_the_two_stages_share_out_the_timesteps(tiny: Opened, tmp_path: Path) -> None:
    """And Diffusers hands over where they meet."""
    planned = plan_with(tmp_path, 'picture = "pictures/000.png"').plan
    assert planned is not None
    parts = []
    for name in ("base", "refiner"):
        limits = tomllib.loads((RECIPES / f"sdxl-two-stage-{name}.toml").read_text())["train"]
        low, high = (limits["timesteps"].get(key, end) for key, end in (("min", 0.0), ("max", 1.0)))
        entries = trained_entries(evolve(planned.objective, min_sigma=low, max_sigma=high), 1.0)
        assert entries is not None
        parts.append({999 - entry for entry in range(entries[0], entries[1] + 1)})
    assert parts[0] | parts[1] == set(range(1000)) and not parts[0] & parts[1]
    scheduler = tiny.stock.scheduler
    scheduler.set_timesteps(40)
    every = {int(t) for t in scheduler.timesteps}
    refined = {int(t) for t in tiny.stock.get_timesteps(40, 0.3, CPU, denoising_start=0.8)[0]}
    assert refined == every & parts[1] and every - refined == every & parts[0]
