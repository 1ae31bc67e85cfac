"""Stable Diffusion XL against Diffusers: prompts, pictures, sizes and cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

from compiler.families import FAMILIES
from runtime.events import Silent
from runtime.execute import execute
from runtime.families import family_of
from runtime.families.base import Framed
from runtime.families.common import encode_prompts, sample
from tests.compiler.recipes import MACHINE, compiled, make_pictures
from tests.runtime.families.conformance import (
    PROMPTS,
    Opened,
    check_parameters,
    check_pictures,
    opened,
)
from tests.runtime.tiny import make_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened("sdxl", tmp_path_factory.mktemp("sdxl"))


def test_known_models_have_the_published_sizes() -> None:
    check_parameters("sdxl")


@torch.no_grad()
def test_embeddings_are_the_stock_pipeline_s(tiny: Opened) -> None:
    found = encode_prompts(tiny.family, tiny.parts, PROMPTS, tiny.text)
    states, negative, pooled, negative_pooled = tiny.stock.encode_prompt(
        PROMPTS, device=CPU, negative_prompt=PROMPTS
    )
    for row, ours in enumerate(found):
        assert torch.equal(ours["encoder_hidden_states"], states[row])
        assert torch.equal(ours["encoder_hidden_states"], negative[row])
        assert torch.equal(ours["text_embeds"], pooled[row])
        assert torch.equal(ours["text_embeds"], negative_pooled[row])


@torch.no_grad()
def test_an_empty_negative_prompt_is_what_the_pipeline_makes_of_none(tiny: Opened) -> None:
    _, negative, _, pooled = tiny.stock.encode_prompt("a dog", device=CPU)
    zeros = evolve(tiny.text, zeros_for_empty=True)
    texts = ["", "blurry"]
    empty, blurry = encode_prompts(tiny.family, tiny.parts, texts, zeros, negative=True)
    assert torch.equal(empty["encoder_hidden_states"], negative[0])
    assert torch.equal(empty["text_embeds"], pooled[0])
    assert not negative.any() and not pooled.any()
    (plain,) = encode_prompts(tiny.family, tiny.parts, [""], zeros)
    (encoded,) = encode_prompts(tiny.family, tiny.parts, [""], tiny.text, negative=True)
    for tensors in (blurry, plain, encoded):
        assert tensors["encoder_hidden_states"].any() and tensors["text_embeds"].any()


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_pictures_are_the_stock_pipeline_s(tiny: Opened, guidance: float) -> None:
    check_pictures(tiny, guidance)


def test_without_a_negative_prompt(tiny: Opened) -> None:
    """The pipeline that is given none draws what we draw from the empty one."""
    options = {"width": 64, "height": 64}
    expected = tiny.stock(
        "a dog",
        guidance_scale=5.0,
        num_inference_steps=2,
        generator=torch.Generator("cpu").manual_seed(5),
        **options,
    ).images[0]
    text = evolve(tiny.text, zeros_for_empty=True)
    (positive,) = encode_prompts(tiny.family, tiny.parts, ["a dog"], text)
    (negative,) = encode_prompts(tiny.family, tiny.parts, [""], text, negative=True)
    drawn = sample(
        tiny.family, tiny.parts, positive, negative, guidance=5.0, steps=2, seed=5, **options
    )
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


@torch.no_grad()
def test_sizes_and_cuts_reach_the_model_as_the_pipeline_hands_them(tiny: Opened) -> None:
    """What the pipeline calls its model with, for sizes and a cut that are all different."""
    seen = {}
    unet = tiny.stock.unet

    def note(module: torch.nn.Module, arguments: object, given: dict[str, object]) -> None:
        seen.update(given["added_cond_kwargs"])  # type: ignore[call-overload]

    hook = unet.register_forward_pre_hook(note, with_kwargs=True)
    tiny.stock(
        "a dog",
        guidance_scale=1.0,
        num_inference_steps=1,
        width=128,
        height=64,
        original_size=(301, 402),
        crops_coords_top_left=(11, 7),
        target_size=(64, 128),
        output_type="latent",
    )
    hook.remove()
    frame = Framed(original=(301, 402), crop=(11, 7), target=(64, 128))
    told = tiny.family.size_conditions([frame])
    assert torch.equal(told["time_ids"].float(), seen["time_ids"])
    assert told["time_ids"].dtype == torch.int64, "bfloat16 would round 301"


@torch.no_grad()
def test_the_prediction_depends_on_what_it_is_told(tiny: Opened) -> None:
    """And is the model's own, called by hand."""
    unet = tiny.parts["unet"]
    generator = torch.Generator().manual_seed(0)
    (text,) = encode_prompts(tiny.family, tiny.parts, ["a dog"], tiny.text)
    noisy = torch.randn(1, 4, 8, 8, generator=generator)
    sigmas = torch.tensor([0.25])
    frame = Framed(original=(301, 402), crop=(11, 7), target=(64, 64))
    found = []
    for each in (frame, evolve(frame, crop=(0, 0))):
        beside = tiny.family.collate_text([text]) | tiny.family.size_conditions([each])
        found.append(tiny.family.predict(unet, noisy, sigmas, beside))
    expected = unet(
        noisy,
        torch.tensor([249]),
        text["encoder_hidden_states"][None],
        added_cond_kwargs={
            "text_embeds": text["text_embeds"][None],
            "time_ids": torch.tensor([[301.0, 402.0, 11.0, 7.0, 64.0, 64.0]]),
        },
    ).sample
    assert torch.equal(found[0], expected)
    assert not torch.equal(found[1], expected)


def test_the_card_says_what_the_published_index_says() -> None:
    assert FAMILIES["sdxl"].zeros_for_empty is True


RECIPE = """\
name = "r"
seed = 1
output = "runs"
[model]
family = "sdxl"
base = "base"
[adapter]
kind = "lora"
rank = 2
[data]
resolution = 64
crop = { style = "corner" }
[[data.source]]
path = "pictures"
captions = { from = "instance", prompt = "a dog", dropout = 1.0 }
[train]
steps = 2
batch_size = 2
optimizer = { name = "adamw", lr = 1e-3 }
[cache]
path = "cache"
"""


def test_a_run_tells_true_sizes_and_drops_captions_to_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From recipe to model: what the UNet is called with in the first step."""
    make_tiny("sdxl", tmp_path / "base")
    make_pictures(tmp_path / "pictures", [(100, 64), (64, 64)])
    (tmp_path / "recipe.toml").write_text(RECIPE)
    result = compiled(tmp_path / "recipe.toml", machine=MACHINE)
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    seen: list[dict[str, torch.Tensor]] = []
    family = family_of("sdxl")
    predict = type(family).predict

    def note(self: Any, model: Any, noisy: Any, sigmas: Any, text: Any) -> Any:
        seen.append(dict(text))
        return predict(self, model, noisy, sigmas, text)

    monkeypatch.setattr(type(family), "predict", note)
    assert execute(result.plan, result.manifest, Silent()).status == "finished"
    told = {tuple(row) for batch in seen for row in batch["time_ids"].tolist()}
    # Height and width as they lie on the disk, top and left of the cut, height and width of it: the
    # wide one is scaled by 0.8 to 80 x 51, of which the lowest 48 rows are taken.
    assert told == {(64, 64, 0, 0, 64, 64), (64, 100, 3, 0, 48, 80)}
    assert all(not batch["encoder_hidden_states"].any() for batch in seen)
    assert all(not batch["text_embeds"].any() for batch in seen)
