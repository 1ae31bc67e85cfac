"""Flux.2 klein against Diffusers: prompts, pictures, latents, places, shift and targets."""

from __future__ import annotations

import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import nn

from compiler.families import FAMILIES
from compiler.lock import dumps, loads
from compiler.noise import shift_of
from compiler.plan import Objective, Precision
from runtime.batch import Batch
from runtime.families.common import encode_prompts, sample
from runtime.families.flux import packed, unpacked
from runtime.families.flux2 import places
from runtime.methods.lora import is_linear, matching
from runtime.step import forward_losses
from tests.compiler.recipes import compiled, make_pictures
from tests.runtime.families.conformance import (
    PROMPTS,
    Opened,
    check_parameters,
    opened,
)

CARD = FAMILIES["flux2"]
PIPELINE = diffusers.Flux2KleinPipeline
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened("flux2", tmp_path_factory.mktemp("flux2"))


def test_known_models_have_the_published_sizes() -> None:
    check_parameters("flux2")


@torch.no_grad()
def test_embeddings_are_the_stock_pipeline_s(tiny: Opened) -> None:
    """The last prompt is cut off; the others have padding, of which the encoder is told."""
    prompts = [*PROMPTS[:2], "red circle " * 60]
    found = encode_prompts(tiny.family, tiny.parts, prompts, tiny.text)
    states, _ = tiny.stock.encode_prompt(prompts)
    for ours, expected in zip(found, states, strict=True):
        assert ours["encoder_hidden_states"].shape == (512, 48)
        assert torch.equal(ours["encoder_hidden_states"], expected)
    assert not torch.equal(states[0], states[1])


@torch.no_grad()
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_pictures_are_the_stock_pipeline_s(tiny: Opened, guidance: float) -> None:
    """Bit for bit. The pipeline takes a negative prompt as an embedding only."""
    negative, _ = tiny.stock.encode_prompt("blurry")
    expected = tiny.stock(
        prompt=PROMPTS[0],
        negative_prompt_embeds=negative,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(7),
        width=128,
        height=64,
        num_inference_steps=3,
    ).images[0]
    words = encode_prompts(tiny.family, tiny.parts, [PROMPTS[0], "blurry"], tiny.text)
    drawn = sample(
        tiny.family,
        {k: v for k, v in tiny.parts.items() if k in ("transformer", "vae", "scheduler")},
        *words,
        width=128,
        height=64,
        guidance=guidance,
        steps=3,
        seed=7,
    )
    assert np.asarray(expected).std() > 1, "a picture without contrast proves nothing"
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


@torch.no_grad()
def test_latents_are_what_the_pipeline_makes_of_a_picture(tiny: Opened) -> None:
    pixels = torch.rand(1, 3, 64, 96) * 2 - 1
    cached = tiny.family.encode_pixels(tiny.parts["vae"], pixels)
    ours = tiny.family.latents(cached, dict(tiny.parts["vae"].config), None)
    assert ours.shape == (1, 4, 8, 12)
    expected = tiny.stock._encode_vae_image(pixels, torch.Generator())
    torch.testing.assert_close(packed(ours), PIPELINE._pack_latents(expected))
    assert torch.equal(packed(ours), PIPELINE._pack_latents(PIPELINE._patchify_latents(ours)))
    assert torch.equal(unpacked(packed(ours), 8, 12), ours)


def test_places_are_the_pipeline_s() -> None:
    image = PIPELINE._prepare_latent_ids(torch.zeros(1, 16, 3, 5))[0]
    assert torch.equal(places(3, 5, 1, CPU), image.float())
    text = PIPELINE._prepare_text_ids(torch.zeros(1, 7, 4))[0]
    assert torch.equal(places(1, 1, 7, CPU), text.float())


@torch.no_grad()
def test_the_loss_is_that_of_the_velocity(tiny: Opened) -> None:
    """z = (1 - s) x + s n, packed by the pipeline; the model is to say n - x."""
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(2, 4, 8, 4, generator=generator) for _ in range(2))
    sigmas = torch.tensor([0.25, 0.75])
    text = tiny.family.collate_text(encode_prompts(tiny.family, tiny.parts, PROMPTS[:2], tiny.text))
    objective = Objective(
        prediction="flow",
        sampling="logit-normal",
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
        shift=1.0,
        loss="mse",
        weighting="none",
    )
    ours = forward_losses(
        tiny.family,
        tiny.parts["transformer"],
        Batch(latents=x, noise=noise, sigmas=sigmas, text=text),
        objective,
        Precision(compute="float32", weights="float32", trained="float32", cache="float32"),
    )
    s = sigmas[:, None, None, None]
    squares = PIPELINE._patchify_latents((1 - s) * x + s * noise)
    said = tiny.parts["transformer"](
        hidden_states=PIPELINE._pack_latents(squares),
        timestep=sigmas,
        encoder_hidden_states=text["encoder_hidden_states"],
        img_ids=PIPELINE._prepare_latent_ids(squares),
        txt_ids=PIPELINE._prepare_text_ids(text["encoder_hidden_states"]),
        return_dict=False,
    )[0]
    velocity = PIPELINE._pack_latents(PIPELINE._patchify_latents(noise - x))
    expected = (said.double() - velocity.double()).square().mean(dim=(1, 2))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)


RECIPE = """\
name = "flux2"
output = "runs"
[model]
family = "flux2"
base = "black-forest-labs/FLUX.2-klein-base-4B"
[adapter]
kind = "lora"
[data]
[[data.source]]
path = "pictures"
captions = { from = "instance", prompt = "a photo of sks dog" }
[train]
steps = 3
optimizer = { name = "adamw", lr = 1e-4 }
"""


def test_the_shift_is_the_pipeline_s_whatever_the_scheduler_says(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", [(512, 512)])
    (tmp_path / "recipe.toml").write_text(RECIPE)
    result = compiled(tmp_path / "recipe.toml")
    assert result.plan is not None, result.diagnostics
    sizes = ((1024, 1024), (512, 768), (256, 256), (1056, 1056), (2048, 1024))
    for width, height in sizes:
        mu = compute_empirical_mu((width // 16) * (height // 16), 50)
        found = shift_of(result.plan.objective, height // 8, width // 8)
        assert found == pytest.approx(math.exp(mu))
    assert result.plan.objective.guidance is None
    assert loads(dumps(result.plan)).objective == result.plan.objective


@pytest.mark.parametrize("hub", [True, False])
def test_a_distilled_base_is_drawn_without_guidance_in_four_steps(
    tmp_path: Path, hub: bool
) -> None:
    """As its pipeline does, whatever guidance it is given: its model_index.json says so."""
    base = "black-forest-labs/FLUX.2-klein-4B"
    if not hub:
        stock = opened("flux2", tmp_path / "base").stock
        stock.register_to_config(is_distilled=True)
        stock.save_pretrained(tmp_path / "base")
        base = "base"
    make_pictures(tmp_path / "pictures", [(512, 512)])
    recipe = RECIPE.replace("black-forest-labs/FLUX.2-klein-base-4B", base)
    recipe += '[validation]\nprompts = { dog = "a photo of sks dog" }\n'
    (tmp_path / "recipe.toml").write_text(recipe)
    plan = compiled(tmp_path / "recipe.toml").plan
    assert plan is not None
    assert (plan.validation.guidance, plan.validation.steps) == (1.0, 4)
    (tmp_path / "recipe.toml").write_text(recipe + "guidance = 4.0\n")
    (fault,) = [d for d in compiled(tmp_path / "recipe.toml").diagnostics if d.severity == "error"]
    assert (fault.code, fault.path) == ("not-in-family", "validation.guidance")


def on_meta() -> nn.Module:
    with torch.device("meta"):
        config = dict(CARD.known[0].configs["transformer"])
        model: nn.Module = diffusers.Flux2Transformer2DModel.from_config(config)
    return model


def test_target_sets_match_these_many_layers() -> None:
    model = on_meta()
    counts = {name: len(matching(model, sets)) for name, sets in CARD.target_sets.items()}
    assert counts["attention-image"] == 5 * 4
    assert counts["attention"] == 5 * 8 + 20 * 2
    blocks = {
        name
        for name, layer in model.named_modules()
        if name.startswith(CARD.blocks) and is_linear(layer)
    }
    assert set(matching(model, CARD.target_sets["all-linear"])) == blocks
