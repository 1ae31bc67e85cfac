"""PixArt-Sigma against Diffusers: prompts, pictures, noise, variance, targets and LoRA files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from compiler.families import FAMILIES
from compiler.noise import noise_table, predicted
from compiler.plan import Adapter, Objective, Precision
from runtime.batch import Batch
from runtime.export.conventions import refusal
from runtime.families.common import encode_prompts
from runtime.methods import lora
from runtime.methods.lora import is_linear, matching
from runtime.noise_table import cumulative, kept_at
from runtime.step import micro_step
from tests.runtime.families.conformance import (
    PROMPTS,
    Opened,
    check_parameters,
    check_pictures,
    opened,
)
from tests.runtime.tiny import tiny_model

CARD = FAMILIES["pixart"]
FP32 = Precision(compute="float32", weights="float32", trained="float32", cache="float32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened("pixart", tmp_path_factory.mktemp("pixart"))


def test_known_models_have_the_published_sizes() -> None:
    check_parameters("pixart")


@torch.no_grad()
def test_embeddings_are_the_stock_pipeline_s(tiny: Opened) -> None:
    for negative in (False, True):
        found = encode_prompts(tiny.family, tiny.parts, PROMPTS, tiny.text, negative=negative)
        given = tiny.stock.encode_prompt(PROMPTS, negative_prompt=PROMPTS)
        states, mask = given[2 * negative : 2 * negative + 2]
        ours = tiny.family.collate_text(found)
        longest = ours["encoder_attention_mask"].shape[1]
        assert longest == mask.sum(1).max() == 300  # the longest prompt is cut off
        assert torch.equal(ours["encoder_attention_mask"], mask)
        kept = mask[..., None].bool()
        assert torch.equal(ours["encoder_hidden_states"], states * kept)


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_pictures_are_the_stock_pipeline_s(tiny: Opened, guidance: float) -> None:
    check_pictures(tiny, guidance, use_resolution_binning=False, clean_caption=False)


def test_pictures_in_bf16_too(tmp_path: Path) -> None:
    check_pictures(
        opened("pixart", tmp_path, "bfloat16"),
        4.0,
        use_resolution_binning=False,
        clean_caption=False,
    )


def objective() -> Objective:
    scheduler = CARD.known[0].configs["scheduler"]
    return Objective(
        prediction=predicted(CARD, scheduler),
        table=noise_table(CARD, scheduler),
        sampling="uniform",
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
        shift=1.0,
        loss="mse",
        weighting="none",
    )


def test_the_loss_is_that_of_the_authors_script(tiny: Opened) -> None:
    """DDPM's noise on a linear table, the first half of the output against the noise; the rows of
    the variance get no gradient."""
    ours, scheduler = objective(), diffusers.DDPMScheduler()
    assert ours.table is not None
    assert torch.equal(cumulative(ours.table), scheduler.alphas_cumprod)
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    times = torch.tensor([10, 600])
    levels = (times + 1) / 1000
    text = tiny.family.collate_text(encode_prompts(tiny.family, tiny.parts, PROMPTS[:2], tiny.text))
    batch = Batch(
        latents=x, noise=noise, sigmas=levels, kept=kept_at(ours.table, levels), text=text
    )
    model = tiny.parts["transformer"]
    model.requires_grad_(True)
    losses = micro_step(tiny.family, model, batch, ours, FP32, 2)
    gradients = model.proj_out.weight.grad.unflatten(0, (2, 2, 8))
    assert gradients[:, :, :4].abs().sum(-1).gt(0).all()
    assert gradients[:, :, 4:].eq(0).all()
    model.zero_grad()
    model.requires_grad_(False)
    said = model(
        scheduler.add_noise(x, noise, times),
        encoder_hidden_states=text["encoder_hidden_states"],
        encoder_attention_mask=text["encoder_attention_mask"],
        timestep=times,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample.chunk(2, 1)[0]
    wanted = (said.double() - noise.double()).square().mean((1, 2, 3))
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=0)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        config = dict(CARD.known[0].configs["transformer"])
        model: nn.Module = diffusers.PixArtTransformer2DModel.from_config(config)
    return model


def test_target_sets_match_these_many_layers() -> None:
    model = on_meta()
    counts = {name: len(matching(model, sets)) for name, sets in CARD.target_sets.items()}
    assert counts == {"attention": 28 * 8, "all-linear": 28 * 10, "reference-script": 28 * 10 + 6}
    blocks = {
        name
        for name, layer in model.named_modules()
        if name.startswith(CARD.blocks) and is_linear(layer)
    }
    assert set(matching(model, CARD.target_sets["all-linear"])) == blocks


def test_the_reference_script_s_targets() -> None:
    """Its list, as peft matches it: names that end so. The patches are a 2x2 convolution."""
    listed = ["to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj"]
    listed += ["ff.net.2", "proj", "linear", "linear_1", "linear_2"]
    model = on_meta()
    wanted = {
        name
        for name, _ in model.named_modules()
        if any(name == ending or name.endswith(f".{ending}") for ending in listed)
    }
    ours = set(matching(model, CARD.target_sets["reference-script"]))
    assert wanted - ours == {"pos_embed.proj"}
    assert ours <= wanted


@torch.no_grad()
def test_peft_loads_the_lora_at_its_strength(tiny: Opened, tmp_path: Path) -> None:
    """peft's own loader around Diffusers' model gives what the trained model gives."""
    adapter = Adapter(
        kind="lora",
        rank=2,
        alpha=5.0,
        dropout=0.0,
        init="kaiming",
        targets=CARD.target_sets["all-linear"],
    )
    model = tiny_model("pixart", tiny.folder)
    base = tiny.family.load(model, "transformer", torch.float32, torch.device("cpu"))
    built = lora.prepare(base, adapter, FP32, seed=0)
    for number, parameter in enumerate(built.trainable.values()):
        generator = torch.Generator().manual_seed(number)
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    lora.export(built, model, tiny.family, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(lora.PEFT_FILES)
    names = load_file(tmp_path / lora.PEFT_FILES[0])
    assert all(name.startswith(lora.file_prefix(CARD)) for name in names)
    loaded: Any = PeftModel.from_pretrained(tiny.stock.transformer, tmp_path)
    given = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    trained: Any = built.model
    lora_on, lora_there = trained(**given)[0], loaded(**given)[0]
    assert torch.equal(lora_on, lora_there)
    plain = tiny.parts["transformer"](**given)[0]
    assert (lora_on - plain).abs().max() > 0.01
    loaded.unload()


def test_no_file_is_called_diffusers_that_it_cannot_load() -> None:
    assert "--format peft" in refusal("diffusers", "pixart", "lora")
    assert refusal("peft", "pixart", "lora") == refusal("diffusers", "sd3", "lora") == ""
