"""Lumina-Image 2.0 against Diffusers: prompts, pictures, velocity, lengths of prompts, targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from attrs import evolve
from torch import nn

from compiler.families import FAMILIES
from compiler.plan import Objective, Precision
from runtime.batch import Batch
from runtime.families.common import encode_prompts
from runtime.methods.lora import is_linear, matching
from runtime.step import forward_losses
from tests.runtime.families.conformance import (
    PROMPTS,
    Opened,
    check_parameters,
    check_pictures,
    opened,
)

CARD = FAMILIES["lumina2"]
FP32 = Precision(compute="float32", weights="float32", trained="float32", cache="float32")
OBJECTIVE = Objective(
    prediction="flow",
    sampling="logit-normal",
    logit_mean=0.0,
    logit_std=1.0,
    mode_scale=1.29,
    shift=6.0,
    loss="mse",
    weighting="none",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened("lumina2", tmp_path_factory.mktemp("lumina2"))


def test_known_models_have_the_published_sizes() -> None:
    check_parameters("lumina2")


@torch.no_grad()
@pytest.mark.parametrize("negative", [False, True])
def test_embeddings_are_the_stock_pipeline_s(tiny: Opened, negative: bool) -> None:
    found = encode_prompts(tiny.family, tiny.parts, PROMPTS, tiny.text, negative=negative)
    given = tiny.stock.encode_prompt(PROMPTS, negative_prompt=PROMPTS)
    states, mask = given[2 * negative : 2 * negative + 2]
    ours = tiny.family.collate_text(found)
    assert ours["encoder_attention_mask"].shape[1] == 256  # the longest prompt is cut off
    assert torch.equal(ours["encoder_attention_mask"], mask)
    assert torch.equal(ours["encoder_hidden_states"], states * mask[..., None])


def test_prompts_can_go_without_the_system_prompt(tiny: Opened) -> None:
    bare = evolve(tiny.text, instruction=())
    plain = encode_prompts(tiny.family, tiny.parts, PROMPTS[:1], bare)[0]
    negative = encode_prompts(tiny.family, tiny.parts, PROMPTS[:1], tiny.text, negative=True)[0]
    usual = encode_prompts(tiny.family, tiny.parts, PROMPTS[:1], tiny.text)[0]
    key = "encoder_hidden_states"
    assert torch.equal(plain[key], negative[key])
    assert len(usual[key]) > len(plain[key])


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_pictures_are_the_stock_pipeline_s(tiny: Opened, guidance: float) -> None:
    check_pictures(tiny, guidance)


def test_pictures_in_bf16_too(tmp_path: Path) -> None:
    check_pictures(opened("lumina2", tmp_path, "bfloat16"), 4.0)


@torch.no_grad()
def test_the_loss_is_that_of_the_velocity(tiny: Opened) -> None:
    """As the example script has it: z = t x + (1 - t) n at time t, the model says x - n. Diffusers'
    own transformer, one prompt at a time without padding."""
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(2, 4, 8, 4, generator=generator) for _ in range(2))
    sigmas = torch.tensor([0.25, 0.75])
    prompts = encode_prompts(tiny.family, tiny.parts, PROMPTS[:2], tiny.text)
    text = tiny.family.collate_text(prompts)
    assert not text["encoder_attention_mask"].all()
    batch = Batch(latents=x, noise=noise, sigmas=sigmas, text=text)
    ours = forward_losses(tiny.family, tiny.parts["transformer"], batch, OBJECTIVE, FP32)
    times = 1 - sigmas
    for each, prompt in enumerate(prompts):
        t, one = times[each], slice(each, each + 1)
        states = prompt["encoder_hidden_states"][None]
        said = tiny.stock.transformer(
            hidden_states=t * x[one] + (1 - t) * noise[one],
            timestep=times[one],
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.int64),
        ).sample
        wanted = (said.double() - (x - noise)[one].double()).square().mean()
        torch.testing.assert_close(ours[each].double(), wanted, rtol=1e-4, atol=0)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        config = dict(CARD.known[0].configs["transformer"])
        model: nn.Module = diffusers.Lumina2Transformer2DModel.from_config(config)
    return model


def test_target_sets_match_these_many_layers() -> None:
    model = on_meta()
    counts = {name: len(matching(model, sets)) for name, sets in CARD.target_sets.items()}
    assert counts == {"attention": 30 * 4, "all-linear": 30 * 7 + 28}
    stacks = ("layers.", "noise_refiner.", "context_refiner.")
    blocks = {
        name
        for name, layer in model.named_modules()
        if name.startswith(stacks) and is_linear(layer)
    }
    assert set(matching(model, CARD.target_sets["all-linear"])) == blocks


def test_the_reference_script_s_targets() -> None:
    """Its list, as peft matches it: names that end so."""
    listed = ["to_k", "to_q", "to_v", "to_out.0"]
    wanted = {
        name
        for name, _ in on_meta().named_modules()
        if any(name.endswith(f".{ending}") for ending in listed)
    }
    assert set(matching(on_meta(), CARD.target_sets[CARD.default_targets])) == wanted


@torch.no_grad()
def test_places_are_diffusers_own_in_bf16(tiny: Opened) -> None:
    """Tables that we make anew are those that Diffusers loads, whatever the weights' type."""
    from runtime.families import family_of
    from tests.runtime.tiny import tiny_model

    model, cpu = tiny_model("lumina2", tiny.folder), torch.device("cpu")
    ours: Any = family_of("lumina2").load(model, "transformer", torch.bfloat16, cpu)
    theirs = diffusers.Lumina2Transformer2DModel.from_pretrained(
        tiny.folder, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    tables = zip(ours.rope_embedder.freqs_cis, theirs.rope_embedder.freqs_cis, strict=True)
    assert all(torch.equal(one, other) for one, other in tables)
