"""Kolors against Diffusers: prompts, pictures, its table of noise levels."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from compiler.families import FAMILIES
from compiler.noise import entries_of, noise_table
from compiler.plan import Objective
from runtime.batch import Batch
from runtime.families.base import Framed
from runtime.families.common import encode_prompts
from runtime.noise_levels import sigmas_from_uniform
from runtime.noise_table import cumulative, kept_at, timesteps
from runtime.objective import noised
from tests.runtime.families.conformance import (
    PROMPTS,
    Opened,
    check_parameters,
    check_pictures,
    opened,
)

CARD, CPU = FAMILIES["kolors"], torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened("kolors", tmp_path_factory.mktemp("kolors"))


def test_known_models_have_the_published_sizes() -> None:
    check_parameters("kolors")


@torch.no_grad()
def test_embeddings_are_the_stock_pipeline_s(tiny: Opened) -> None:
    for prompt in PROMPTS:
        (found,) = encode_prompts(tiny.family, tiny.parts, [prompt], tiny.text)
        (other,) = encode_prompts(tiny.family, tiny.parts, [prompt], tiny.text, negative=True)
        states, negative, pooled, negative_pooled = tiny.stock.encode_prompt(
            prompt, device=CPU, negative_prompt=prompt
        )
        assert found["encoder_hidden_states"].shape == (256, 16)
        for ours in (found, other):
            assert torch.equal(ours["encoder_hidden_states"], states[0])
            assert torch.equal(ours["encoder_hidden_states"], negative[0])
            assert torch.equal(ours["text_embeds"], pooled[0])
            assert torch.equal(ours["text_embeds"], negative_pooled[0])


def test_prompts_begin_as_chatglm_was_taught(tiny: Opened) -> None:
    """[gMASK], sop, the words; padding before them, which is not attended to."""
    tokens = tiny.parts["tokenizer"]("ab", padding="max_length", max_length=9)
    marks = [tiny.parts["tokenizer"].get_command(name) for name in ("[gMASK]", "sop")]
    count = sum(tokens["attention_mask"])
    assert tokens["input_ids"][9 - count : 11 - count] == marks
    assert tokens["attention_mask"] == [0] * (9 - count) + [1] * count
    assert tokens["position_ids"][9 - count :] == list(range(count))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_pictures_are_the_stock_pipeline_s(tiny: Opened, guidance: float) -> None:
    check_pictures(tiny, guidance)


def objective(**options: float) -> Objective:
    return Objective(
        prediction="epsilon",
        table=noise_table(CARD, CARD.known[0].configs["scheduler"]),
        sampling="uniform",
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
        shift=1.0,
        loss="mse",
        weighting="none",
        **options,
    )


def test_there_are_1100_noise_levels() -> None:
    """All are drawn, and noised as Diffusers' scheduler does it."""
    ours = objective()
    assert ours.table is not None and entries_of(ours) == 1100
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=1100, beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear"
    )
    assert torch.equal(cumulative(ours.table), scheduler.alphas_cumprod)
    levels = sigmas_from_uniform(torch.linspace(0, 1, 6000), ours)
    drawn = timesteps(levels, 1100)
    assert set(drawn.tolist()) == set(range(1100))
    shape = (len(levels), 1, 2, 2)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        latents=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        sigmas=levels,
        kept=kept_at(ours.table, levels),
        text={},
    )
    assert torch.equal(noised(batch, ours), scheduler.add_noise(batch.latents, batch.noise, drawn))


def test_a_part_of_the_levels() -> None:
    some = objective(max_sigma=0.2)
    drawn = timesteps(sigmas_from_uniform(torch.linspace(0, 1, 6000), some), 1100)
    assert set(drawn.tolist()) == set(range(220))


def test_another_table_is_refused() -> None:
    with pytest.raises(ValueError, match="1100 timesteps"):
        noise_table(CARD, {**CARD.known[0].configs["scheduler"], "num_train_timesteps": 1000})


@torch.no_grad()
def test_the_prediction_is_the_model_s(tiny: Opened) -> None:
    unet = tiny.parts["unet"]
    (text,) = encode_prompts(tiny.family, tiny.parts, ["a dog"], tiny.text)
    frame = Framed(original=(301, 402), crop=(11, 7), target=(64, 64))
    beside = tiny.family.collate_text([text]) | tiny.family.size_conditions([frame])
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = tiny.family.predict(unet, noisy, torch.tensor([1050 / 1100]), beside)
    expected = unet(
        noisy,
        torch.tensor([1049]),
        text["encoder_hidden_states"][None],
        added_cond_kwargs={
            "text_embeds": text["text_embeds"][None],
            "time_ids": torch.tensor([[301.0, 402.0, 11.0, 7.0, 64.0, 64.0]]),
        },
    ).sample
    assert torch.equal(found, expected)


def test_the_encoder_is_the_one_that_was_saved(tiny: Opened) -> None:
    """Its class leaves weights unset when it is made: they must come from the file."""
    stock = dict(tiny.stock.text_encoder.state_dict())
    ours = tiny.parts["text_encoder"].state_dict()
    assert ours.keys() == stock.keys()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in ours.items())
    index = json.loads((tiny.folder / "model_index.json").read_text())
    assert index["text_encoder"] == ["kolors", "ChatGLMModel"]
