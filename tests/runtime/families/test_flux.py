"""Flux.1 against Diffusers: prompts, pictures, packed latents, guidance, shift and targets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from compiler.families import FAMILIES
from compiler.noise import shift_of
from compiler.plan import Objective, Precision
from runtime.batch import Batch
from runtime.families.common import encode_prompts
from runtime.families.flux import packed, places, unpacked
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
from tests.runtime.tiny import make_tiny

CARD = FAMILIES["flux"]
KINDS: dict[str, dict[str, Any]] = {
    "dev": {},
    "schnell": {"guidance_embeds": False},
}


@pytest.fixture(scope="module", params=list(KINDS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened("flux", tmp_path_factory.mktemp("flux"), **KINDS[request.param])


def test_known_models_have_the_published_sizes() -> None:
    check_parameters("flux")


@torch.no_grad()
def test_embeddings_are_the_stock_pipeline_s(tiny: Opened) -> None:
    found = encode_prompts(tiny.family, tiny.parts, PROMPTS, tiny.text)
    states, pooled, _ = tiny.stock.encode_prompt(PROMPTS)
    for ours, tokens, summary in zip(found, states, pooled, strict=True):
        assert ours["encoder_hidden_states"].shape == (512, 48)
        assert torch.equal(ours["encoder_hidden_states"], tokens)
        assert torch.equal(ours["pooled_projections"], summary)


@pytest.mark.parametrize("guidance", [3.5, 1.0])
def test_pictures_are_the_stock_pipeline_s(tiny: Opened, guidance: float) -> None:
    check_pictures(tiny, guidance)


def test_packing_is_the_pipeline_s() -> None:
    latents = torch.randn(2, 4, 6, 10)
    ours = packed(latents)
    assert torch.equal(ours, diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpacked(ours, 6, 10), latents)
    assert torch.equal(diffusers.FluxPipeline._unpack_latents(ours, 48, 80, 8), latents)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(places(3, 5, torch.device("cpu")), ids)


def objective(guidance: float | None, **options: Any) -> Objective:
    given: dict[str, Any] = {"shift": 1.0, **options}
    return Objective(
        prediction="flow",
        sampling="logit-normal",
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
        loss="mse",
        weighting="none",
        guidance=guidance,
        **given,
    )


@torch.no_grad()
def test_the_loss_is_that_of_the_velocity(tiny: Opened) -> None:
    """Written out: z = (1 - s) x + s n is packed by hand, and the model is to say n - x; it is
    told s, the guidance, and where each token is."""
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(2, 4, 8, 4, generator=generator) for _ in range(2))
    sigmas, told = torch.tensor([0.25, 0.75]), tiny.parts["transformer"].config.guidance_embeds
    text = tiny.family.collate_text(encode_prompts(tiny.family, tiny.parts, PROMPTS[:2], tiny.text))
    batch = Batch(latents=x, noise=noise, sigmas=sigmas, text=text)
    precision = Precision(compute="float32", weights="float32", trained="float32", cache="float32")
    ours = forward_losses(
        tiny.family, tiny.parts["transformer"], batch, objective(1.5 if told else None), precision
    )
    s = sigmas[:, None, None, None]
    z = (1 - s) * x + s * noise
    tokens = torch.stack(
        [
            torch.stack([z[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten() for b in (0, 1)])
            for i in range(4)
            for j in range(2)
        ],
        dim=1,
    )
    said = tiny.parts["transformer"](
        hidden_states=tokens,
        encoder_hidden_states=text["encoder_hidden_states"],
        pooled_projections=text["pooled_projections"],
        timestep=sigmas,
        guidance=torch.tensor([1.5, 1.5]) if told else None,
        img_ids=torch.tensor([[0, i, j] for i in range(4) for j in range(2)]).float(),
        txt_ids=torch.zeros(512, 3),
        return_dict=False,
    )[0]
    velocity = noise - x
    wanted = torch.zeros(2, dtype=torch.float64)
    for place in range(8):
        i, j = divmod(place, 2)
        patch = velocity[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)
        wanted += (said[:, place].double() - patch.double()).square().sum(1)
    torch.testing.assert_close(ours.double(), wanted / (4 * 8 * 4), rtol=1e-5, atol=0)


RECIPE = """\
name = "flux"
output = "runs"
[model]
family = "flux"
base = "{base}"
[adapter]
kind = "lora"
[data]
[[data.source]]
path = "pictures"
captions = {{ from = "instance", prompt = "a photo of sks dog" }}
[train]
steps = 3
optimizer = {{ name = "adamw", lr = 1e-4 }}
{train}
[validation]
prompts = {{ dog = "a photo of sks dog" }}
{validation}
"""


def planned(folder: Path, base: str, train: str = "", validation: str = "") -> Any:
    if not (folder / "pictures").exists():
        make_pictures(folder / "pictures", [(640, 480), (512, 512)])
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(base=base, train=train, validation=validation))
    return compiled(path)


def test_the_shift_is_the_pipeline_s(tmp_path: Path) -> None:
    """By the size of each picture, with the pipeline's function and the scheduler's own steps."""
    plan = planned(tmp_path, "black-forest-labs/FLUX.1-dev").plan
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        dict(CARD.known[0].configs["scheduler"])
    )
    for width, height in ((1024, 1024), (512, 768)):
        mu = calculate_shift((width // 16) * (height // 16))
        found = shift_of(plan.objective, height // 8, width // 8)
        assert found == pytest.approx(math.exp(mu))
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10), mu=mu)
        even = torch.linspace(1, 0.1, 10, dtype=torch.float64)
        torch.testing.assert_close(
            scheduler.sigmas[:-1].double(), found * even / (1 + (found - 1) * even)
        )
    assert plan.objective.shift == 0.0


def test_each_base_has_its_own_usual_settings(tmp_path: Path) -> None:
    dev = planned(tmp_path, "black-forest-labs/FLUX.1-dev").plan
    assert (dev.objective.guidance, dev.text.max_length) == (1.0, 512)
    assert (dev.validation.guidance, dev.validation.steps) == (3.5, 28)
    krea = planned(tmp_path, "black-forest-labs/FLUX.1-Krea-dev", "guidance = 3.5").plan
    assert (krea.objective.guidance, krea.validation.guidance) == (3.5, 4.5)
    schnell = planned(tmp_path, "black-forest-labs/FLUX.1-schnell").plan
    assert (schnell.objective.guidance, schnell.text.max_length) == (None, 256)
    assert (schnell.validation.guidance, schnell.validation.steps) == (0.0, 4)
    assert schnell.objective.shift == 1.0


@pytest.mark.parametrize(
    ("base", "options", "key"),
    [
        ("schnell", {"train": "guidance = 2.0"}, "train.guidance"),
        ("dev", {"validation": 'negative = "blurry"'}, "validation.negative"),
    ],
)
def test_what_a_base_is_not_told_is_refused(
    tmp_path: Path, base: str, options: dict[str, str], key: str
) -> None:
    result = planned(tmp_path, f"black-forest-labs/FLUX.1-{base}", **options)
    (fault,) = [d for d in result.diagnostics if d.severity == "error"]
    assert (fault.code, fault.path) == ("not-in-family", key)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        config = dict(CARD.known[0].configs["transformer"])
        model: nn.Module = diffusers.FluxTransformer2DModel.from_config(config)
    return model


def test_target_sets_match_these_many_layers() -> None:
    model = on_meta()
    counts = {name: len(matching(model, sets)) for name, sets in CARD.target_sets.items()}
    assert counts["attention-image"] == 19 * 4 + 38 * 3
    assert counts["attention"] == 19 * 8 + 38 * 3
    blocks = {
        name
        for name, layer in model.named_modules()
        if name.startswith(CARD.blocks) and is_linear(layer)
    }
    assert set(matching(model, CARD.target_sets["all-linear"])) == blocks


def test_the_reference_script_s_targets() -> None:
    """Its list, as peft matches it: names that end so."""
    attention = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj"]
    listed = [f".attn.{ending}" for ending in (*attention, "to_add_out")]
    listed += [f".{ff}.net.{end}" for ff in ("ff", "ff_context") for end in ("0.proj", "2")]
    model = on_meta()
    wanted = {name for name, _ in model.named_modules() if name.endswith(tuple(listed))}
    assert set(matching(model, CARD.target_sets[CARD.default_targets])) == wanted


def test_a_tiny_folder_plans(tmp_path: Path) -> None:
    make_tiny("flux", tmp_path / "base")
    result = planned(tmp_path, "base", 'timesteps = { shift = "resolution" }')
    assert result.plan is not None, result.diagnostics
    assert result.plan.objective.shift_by_size.patch == 2
