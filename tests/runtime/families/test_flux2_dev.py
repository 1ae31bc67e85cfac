"""Flux.2 dev against Diffusers: prompts, pictures and guidance; the rest is klein's."""

from __future__ import annotations

import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from compiler.families import FAMILIES
from compiler.noise import shift_of
from compiler.plan import Objective, Precision
from runtime.batch import Batch
from runtime.families.common import encode_prompts, sample
from runtime.methods.lora import is_linear, matching
from runtime.step import forward_losses
from tests.compiler.recipes import compiled, make_pictures
from tests.runtime.families.conformance import PROMPTS, Opened, check_parameters, opened

CARD = FAMILIES["flux2_dev"]
PIPELINE = diffusers.Flux2Pipeline


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened("flux2_dev", tmp_path_factory.mktemp("flux2_dev"))


def test_known_models_have_the_published_sizes() -> None:
    check_parameters("flux2_dev")


@torch.no_grad()
def test_embeddings_are_the_stock_pipeline_s(tiny: Opened) -> None:
    """The last prompt is cut off; the others have padding, before them, of which the encoder is
    told. What would stand for a picture is taken out."""
    prompts = [*PROMPTS[:2], "red circle " * 60, "a [IMG] dog"]
    found = encode_prompts(tiny.family, tiny.parts, prompts, tiny.text)
    states, _ = tiny.stock.encode_prompt(prompts)
    for ours, expected in zip(found, states, strict=True):
        assert ours["encoder_hidden_states"].shape == (512, 48)
        assert torch.equal(ours["encoder_hidden_states"], expected)
    assert not torch.equal(states[0], states[1])
    plain, _ = tiny.stock.encode_prompt(["a  dog"])
    assert torch.equal(found[3]["encoder_hidden_states"], plain[0])


def test_the_tokenizer_reads_conversations_as_its_processor_does(tiny: Opened) -> None:
    """Which the published folder has, and which asks for torchvision even for text alone."""
    pytest.importorskip("torchvision")
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input
    from transformers import PixtralProcessor

    tokens = tiny.parts["tokenizer"]
    whole = PixtralProcessor(
        image_processor=None, tokenizer=tokens, chat_template=tokens.chat_template
    )
    options = {"tokenize": True, "return_dict": True, "padding": "max_length", "truncation": True}
    said = format_input(PROMPTS)
    one, other = (
        each.apply_chat_template(said, max_length=64, **options) for each in (tokens, whole)
    )
    assert one["input_ids"] == other["input_ids"]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_pictures_are_the_stock_pipeline_s(tiny: Opened, guidance: float) -> None:
    """Bit for bit; and the guidance that the transformer is told shows."""
    expected = tiny.stock(
        prompt=PROMPTS[0],
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(7),
        width=128,
        height=64,
        num_inference_steps=3,
    ).images[0]
    words = encode_prompts(tiny.family, tiny.parts, [PROMPTS[0], "blurry"], tiny.text)
    parts = {k: v for k, v in tiny.parts.items() if k in ("transformer", "vae", "scheduler")}
    drawn = [
        np.asarray(
            sample(
                tiny.family, parts, *words, width=128, height=64, guidance=scale, steps=3, seed=7
            )
        )
        for scale in (guidance, guidance + 5)
    ]
    assert np.asarray(expected).std() > 1, "a picture without contrast proves nothing"
    assert np.array_equal(drawn[0], np.asarray(expected))
    assert not np.array_equal(drawn[0], drawn[1])


@torch.no_grad()
def test_the_loss_is_that_of_the_velocity_under_the_guidance_that_is_told(tiny: Opened) -> None:
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
        guidance=3.0,
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
        guidance=torch.full((2,), 3.0),
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
family = "flux2_dev"
base = "black-forest-labs/FLUX.2-dev"
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


def test_plans_with_the_pipeline_s_shift_and_guidance(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", [(512, 512)])
    (tmp_path / "recipe.toml").write_text(RECIPE)
    result = compiled(tmp_path / "recipe.toml")
    assert result.plan is not None, result.diagnostics
    for width, height in ((1024, 1024), (512, 768), (1056, 1056), (2048, 1024)):
        mu = compute_empirical_mu((width // 16) * (height // 16), 50)
        found = shift_of(result.plan.objective, height // 8, width // 8)
        assert found == pytest.approx(math.exp(mu))
    assert result.plan.objective.guidance == 1.0


def test_target_sets_match_these_many_layers() -> None:
    with torch.device("meta"):
        config = dict(CARD.known[0].configs["transformer"])
        model = diffusers.Flux2Transformer2DModel.from_config(config)
    counts = {name: len(matching(model, sets)) for name, sets in CARD.target_sets.items()}
    assert counts["attention-image"] == 8 * 4
    assert counts["attention"] == 8 * 8 + 48 * 2
    blocks = {
        name
        for name, layer in model.named_modules()
        if name.startswith(CARD.blocks) and is_linear(layer)
    }
    assert set(matching(model, CARD.target_sets["all-linear"])) == blocks
