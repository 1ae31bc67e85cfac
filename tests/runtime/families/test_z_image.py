"""Z-Image against Diffusers: prompts, pictures, velocity, lengths of prompts, shift, targets."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

from compiler.families import FAMILIES
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

CARD = FAMILIES["z_image"]
FP32 = Precision(compute="float32", weights="float32", trained="float32", cache="float32")
OBJECTIVE = Objective(
    prediction="flow",
    sampling="logit-normal",
    logit_mean=0.0,
    logit_std=1.0,
    mode_scale=1.29,
    shift=3.0,
    loss="mse",
    weighting="none",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened("z_image", tmp_path_factory.mktemp("z_image"))


def test_known_models_have_the_published_sizes() -> None:
    check_parameters("z_image")


@torch.no_grad()
def test_embeddings_are_the_stock_pipeline_s(tiny: Opened) -> None:
    positive, negative = tiny.stock.encode_prompt([*PROMPTS], negative_prompt=[*PROMPTS])
    for given, is_negative in ((positive, False), (negative, True)):
        found = encode_prompts(tiny.family, tiny.parts, PROMPTS, tiny.text, negative=is_negative)
        assert max(map(len, given)) == 512  # the longest prompt is cut off
        for ours, theirs in zip(found, given, strict=True):
            assert torch.equal(ours["encoder_hidden_states"], theirs)


@pytest.mark.parametrize("guidance", [4.0, 0.5, 0.0])
def test_pictures_are_the_stock_pipeline_s(tiny: Opened, guidance: float) -> None:
    check_pictures(tiny, guidance)


def test_pictures_in_bf16_too(tmp_path: Path) -> None:
    check_pictures(opened("z_image", tmp_path, "bfloat16"), 4.0)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 4), (16, 16)])
def test_the_loss_is_that_of_the_velocity(tiny: Opened, size: tuple[int, int]) -> None:
    """z = t x + (1 - t) n at time t, the model says x - n. Diffusers' own transformer, one prompt
    at a time; tokens of the larger picture need no filling up."""
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(2, 4, *size, generator=generator) for _ in range(2))
    sigmas = torch.tensor([0.25, 0.75])
    prompts = encode_prompts(tiny.family, tiny.parts, PROMPTS[:2], tiny.text)
    text = tiny.family.collate_text(prompts)
    assert not text["encoder_attention_mask"].all()
    batch = Batch(latents=x, noise=noise, sigmas=sigmas, text=text)
    ours = forward_losses(tiny.family, tiny.parts["transformer"], batch, OBJECTIVE, FP32)
    for each, prompt in enumerate(prompts):
        t = 1 - sigmas[each]
        z = t * x[each] + (1 - t) * noise[each]
        said = tiny.stock.transformer(
            [z[:, None]], t[None], [prompt["encoder_hidden_states"]], return_dict=False
        )[0][0][:, 0]
        wanted = (said.double() - (x - noise)[each].double()).square().mean()
        torch.testing.assert_close(ours[each].double(), wanted, rtol=1e-4, atol=0)


RECIPE = """\
name = "z-image"
output = "runs"
[model]
family = "z_image"
base = "Tongyi-MAI/{base}"
[adapter]
kind = "lora"
[data]
[[data.source]]
path = "pictures"
captions = {{ from = "instance", prompt = "a photo of sks dog" }}
[train]
steps = 3
optimizer = {{ name = "adamw", lr = 1e-4 }}
[validation]
prompts = {{ dog = "a photo of sks dog" }}
"""


def test_each_base_has_its_own_usual_settings(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", [(640, 480), (512, 512)])
    path = tmp_path / "recipe.toml"
    found = {}
    for base in ("Z-Image", "Z-Image-Turbo"):
        path.write_text(RECIPE.format(base=base))
        plan = compiled(path).plan
        assert plan is not None
        found[base] = plan.objective.shift, plan.validation.guidance, plan.validation.steps
        assert all(bucket.width % 16 == bucket.height % 16 == 0 for bucket in plan.buckets)
    assert found == {"Z-Image": (6.0, 4.0, 50), "Z-Image-Turbo": (3.0, 0.0, 9)}


def on_meta() -> nn.Module:
    with torch.device("meta"):
        config = dict(CARD.known[0].configs["transformer"])
        model: nn.Module = diffusers.ZImageTransformer2DModel.from_config(config)
    return model


def test_target_sets_match_these_many_layers() -> None:
    model = on_meta()
    counts = {name: len(matching(model, sets)) for name, sets in CARD.target_sets.items()}
    assert counts == {"attention": 34 * 4, "all-linear": 34 * 7 + 32}
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
