"""Pictures by other samplers than the base's: Diffusers' own pipeline with that scheduler."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from compiler.families import FAMILIES
from compiler.samplers import SAMPLERS
from runtime.families.common import encode_prompts, sample
from runtime.samplers import sampler
from tests.runtime.families.conformance import Opened, opened
from tests.runtime.tiny import tiny_model

SHIFT = 3.0  # of the tiny flows


@pytest.fixture(scope="module", params=["sd", "sd3", "sana"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_pictures(tiny: Opened, name: str) -> None:
    card, facts = tiny.family.card, SAMPLERS[name]
    flows = card.prediction == "flow"
    kind = facts.flow if flows else facts.table
    if not kind:
        pytest.skip("not for flows")
    options = {} if flows else {"clip_sample": False}
    if flows and not kind.startswith("FlowMatch"):
        options = {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "flow_shift": SHIFT,
        }
    tiny.stock.scheduler = getattr(diffusers, kind).from_config(
        tiny.parts["scheduler"].config, **options
    )
    more = {"use_resolution_binning": False} if card.name == "sana" else {}
    expected = tiny.stock(
        "red circle",
        negative_prompt="blurry",
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(7),
        width=64,
        height=64,
        num_inference_steps=4,
        **more,
    ).images[0]
    positive, negative = (
        encode_prompts(tiny.family, tiny.parts, [text], tiny.text, negative=bool(n))[0]
        for n, text in enumerate(("red circle", "blurry"))
    )
    chosen = sampler(tiny_model(card.name, tiny.folder), name)
    parts = {k: tiny.parts[k] for k in (card.trained_component, "vae")}
    drawn = sample(
        tiny.family,
        {**parts, "scheduler": chosen},
        positive,
        negative,
        width=64,
        height=64,
        guidance=3.0,
        steps=4,
        seed=7,
    )
    assert type(chosen).__name__ == kind
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_every_name_is_in_the_recipe_s_list() -> None:
    from attrs import fields

    from compiler.schema import ValidationRecipe

    allowed = str(fields(ValidationRecipe).scheduler.type)
    assert all(f"'{name}'" in allowed or f'"{name}"' in allowed for name in SAMPLERS)


def test_the_base_s_own_is_the_default(tmp_path: Path) -> None:
    made = opened("sd", tmp_path)
    own = sampler(tiny_model("sd", tmp_path))
    assert type(own) is type(made.stock.scheduler)
    assert own.config == made.stock.scheduler.config
    assert FAMILIES["sd"].components["scheduler"] == type(own).__name__
