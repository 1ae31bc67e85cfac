"""Qwen-Image against Diffusers: prompts, pictures, latents, velocity, masks, shift, targets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import nn

from compiler.families import FAMILIES
from compiler.noise import shift_of
from compiler.plan import Objective, Precision
from runtime.batch import Batch
from runtime.families.common import encode_prompts
from runtime.methods.lora import is_linear, matching
from runtime.step import forward_losses
from tests.compiler.recipes import compiled, make_pictures
from tests.runtime.families.conformance import (
    PROMPTS,
    Opened,
    check_parameters,
    check_pictures,
    opened,
)

CARD = FAMILIES["qwen_image"]
FP32 = Precision(compute="float32", weights="float32", trained="float32", cache="float32")
OBJECTIVE = Objective(
    prediction="flow",
    sampling="logit-normal",
    logit_mean=0.0,
    logit_std=1.0,
    mode_scale=1.29,
    shift=1.0,
    loss="mse",
    weighting="none",
)
LONG = "red circle " * 120  # more than 512 tokens; this pipeline cuts behind its encoder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened("qwen_image", tmp_path_factory.mktemp("qwen_image"))


def test_known_models_have_the_published_sizes() -> None:
    check_parameters("qwen_image")


@torch.no_grad()
def test_embeddings_are_the_stock_pipeline_s(tiny: Opened) -> None:
    prompts = [*PROMPTS, LONG]
    found = encode_prompts(tiny.family, tiny.parts, prompts, tiny.text)
    negative = encode_prompts(tiny.family, tiny.parts, prompts, tiny.text, negative=True)
    for prompt, ours, other in zip(prompts, found, negative, strict=True):
        states, mask = tiny.stock.encode_prompt(prompt, max_sequence_length=512)
        assert mask is None
        assert torch.equal(ours["encoder_hidden_states"], states[0])
        assert torch.equal(other["encoder_hidden_states"], states[0])
    assert len(found[-1]["encoder_hidden_states"]) == 512


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_pictures_are_the_stock_pipeline_s(tiny: Opened, guidance: float) -> None:
    check_pictures(tiny, guidance)


def test_pictures_in_bf16_too(tmp_path: Path) -> None:
    check_pictures(opened("qwen_image", tmp_path, "bfloat16"), 4.0)


@torch.no_grad()
def test_latents_are_those_of_the_script(tiny: Opened) -> None:
    """A video of one frame; each channel less its mean, over its deviation. And back."""
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae, config = tiny.stock.vae, dict(tiny.stock.vae.config)
    cached = tiny.family.encode_pixels(tiny.parts["vae"], pixels)
    noise = torch.randn(cached["mean"].shape, generator=torch.Generator().manual_seed(1))
    posterior = vae.encode(pixels.unsqueeze(2)).latent_dist
    drawn = posterior.mean + posterior.std * noise.unsqueeze(2)
    wanted = torch.stack(
        [
            (drawn[:, c, 0] - config["latents_mean"][c]) / config["latents_std"][c]
            for c in range(config["z_dim"])
        ],
        dim=1,
    )
    ours = tiny.family.latents(cached, config, noise)
    assert ours.shape == (2, 4, 4, 6)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    back = tiny.family.decode(tiny.parts, ours)
    torch.testing.assert_close(back, vae.decode(drawn).sample[:, :, 0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PROMPTS[:2], PROMPTS[:1] * 2], ids=["masked", "unmasked"])
def test_the_loss_is_that_of_the_velocity(tiny: Opened, prompts: list[str]) -> None:
    """Diffusers' own transformer with the pipeline's packing, one prompt at a time."""
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(2, 4, 8, 4, generator=generator) for _ in range(2))
    sigmas = torch.tensor([0.25, 0.75])
    embedded = encode_prompts(tiny.family, tiny.parts, prompts, tiny.text)
    text = tiny.family.collate_text(embedded)
    assert ("encoder_attention_mask" in text) == (prompts[0] != prompts[1])
    batch = Batch(latents=x, noise=noise, sigmas=sigmas, text=text)
    ours = forward_losses(tiny.family, tiny.parts["transformer"], batch, OBJECTIVE, FP32)
    pack = diffusers.QwenImagePipeline._pack_latents
    for each, prompt in enumerate(embedded):
        s, one = sigmas[each], slice(each, each + 1)
        said = tiny.stock.transformer(
            hidden_states=pack((1 - s) * x[one] + s * noise[one], 1, 4, 8, 4),
            timestep=sigmas[one],
            encoder_hidden_states=prompt["encoder_hidden_states"][None],
            img_shapes=[[(1, 4, 2)]],
        ).sample
        wanted = (said.double() - pack((noise - x)[one], 1, 4, 8, 4).double()).square().mean()
        torch.testing.assert_close(ours[each].double(), wanted, rtol=1e-4, atol=0)


RECIPE = """\
name = "qwen"
output = "runs"
[model]
family = "qwen_image"
base = "Qwen/Qwen-Image"
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


def test_the_shift_is_the_pipeline_s(tmp_path: Path) -> None:
    """By the size of each picture, with the pipeline's function and the base's scheduler."""
    make_pictures(tmp_path / "pictures", [(640, 480), (512, 512)])
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    plan: Any = compiled(path).plan
    assert plan.objective.shift == 0.0
    assert all(bucket.width % 16 == bucket.height % 16 == 0 for bucket in plan.buckets)
    for width, height in ((1328, 1328), (512, 768)):
        mu = calculate_shift((width // 16) * (height // 16), 256, 8192, 0.5, 0.9)
        assert shift_of(plan.objective, height // 8, width // 8) == pytest.approx(math.exp(mu))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        config = dict(CARD.known[0].configs["transformer"])
        model: nn.Module = diffusers.QwenImageTransformer2DModel.from_config(config)
    return model


def test_target_sets_match_these_many_layers() -> None:
    model = on_meta()
    counts = {name: len(matching(model, sets)) for name, sets in CARD.target_sets.items()}
    assert counts == {"attention-image": 60 * 4, "attention": 60 * 8, "all-linear": 60 * 14}
    blocks = {
        name
        for name, layer in model.named_modules()
        if name.startswith(CARD.blocks) and is_linear(layer)
    }
    assert set(matching(model, CARD.target_sets["all-linear"])) == blocks


def test_the_reference_script_s_targets() -> None:
    """Its list, as peft matches it: names that end so."""
    listed = ["to_k", "to_q", "to_v", "to_out.0"]
    model = on_meta()
    wanted = {
        name
        for name, _ in model.named_modules()
        if any(name.endswith(f".{ending}") for ending in listed)
    }
    assert set(matching(model, CARD.target_sets[CARD.default_targets])) == wanted
