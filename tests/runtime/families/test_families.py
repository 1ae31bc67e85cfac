"""Families against Diffusers' own pipelines: prompts, latents, pictures."""

from __future__ import annotations

import copy
import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from compiler.plan import Text
from runtime.families import MODULES, family_of
from runtime.families.base import Family, TextEmbedding
from runtime.families.common import DTYPES, encode_prompts, sample
from tests.runtime import tiny
from tests.runtime.tiny import make_tiny, tiny_model

CPU = torch.device("cpu")
PROMPTS = ["A Photo of a sks dog, caf\u00e9", "", "red circle " * 60]  # the last one is cut off


@pytest.fixture(params=["sana", "sd3", "recorded sana", "recorded sd3"])
def pipeline(request: pytest.FixtureRequest) -> Path:
    """Tiny pipelines: made here, and those of the reference runs."""
    origin, _, name = request.param.rpartition(" ")
    if origin:
        root: Path = request.getfixturevalue("data_root")
        return root / "oracle" / f"tiny-{name}"
    folder: Path = request.getfixturevalue(f"tiny_{name}")
    return folder


def opened(folder: Path, dtype: str = "float32") -> tuple[Family, dict[str, Any], Any]:
    """The family, its parts as we load them, and the stock pipeline."""
    family, parts, stock = _opened(folder, dtype)
    return family, dict(parts), stock


@cache
def _opened(folder: Path, dtype: str) -> tuple[Family, dict[str, Any], Any]:
    index = json.loads((folder / "model_index.json").read_text())
    name = "sana" if index["_class_name"] == "SanaPipeline" else "sd3"
    family = family_of(name)
    model = tiny_model(name, folder)
    parts = {c: family.load(model, c, DTYPES[dtype], CPU) for c in family.card.components}
    stock = getattr(diffusers, family.card.pipeline).from_pretrained(folder, dtype=DTYPES[dtype])
    stock.set_progress_bar_config(disable=True)
    return family, parts, stock


def text_of(family: Family) -> Text:
    return Text(max_length=family.card.prompt_length, instruction=family.card.instruction)


@torch.no_grad()
def stock_embeddings(stock: Any, prompts: list[str], negative: list[str]) -> dict[str, Tensor]:
    """The pipeline's `encode_prompt` as its `__call__` calls it by default."""
    if isinstance(stock, diffusers.SanaPipeline):
        default = inspect.signature(stock.__call__).parameters["complex_human_instruction"].default
        names = ("states", "mask", "negative_states", "negative_mask")
        given: Any = stock.encode_prompt(
            prompts, negative_prompt=negative, complex_human_instruction=default
        )
    else:
        names = ("states", "negative_states", "pooled", "negative_pooled")
        given = stock.encode_prompt(prompts, None, None, negative_prompt=negative)
    return dict(zip(names, given, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_are_the_stock_pipeline_s(pipeline: Path, dtype: str) -> None:
    family, parts, stock = opened(pipeline, dtype)
    expected = stock_embeddings(stock, PROMPTS, PROMPTS)
    for prefix in ("", "negative_"):
        found = encode_prompts(family, parts, PROMPTS, text_of(family), negative=bool(prefix))
        for index, embedding in enumerate(found):
            states = expected[f"{prefix}states"][index]
            if "mask" in expected:
                states = states[expected[f"{prefix}mask"][index].bool()]
                assert len(states) < family.card.prompt_length or index == 2
            else:
                pooled = expected[f"{prefix}pooled"][index]
                assert torch.equal(embedding["pooled_projections"], pooled)
            assert torch.equal(embedding["encoder_hidden_states"], states)
            assert embedding["encoder_hidden_states"].dtype == DTYPES[dtype]


def test_padding_does_not_change_a_prediction(tiny_sana: Path) -> None:
    family, parts, stock = opened(tiny_sana)
    expected = stock_embeddings(stock, PROMPTS, PROMPTS)
    short = encode_prompts(family, parts, PROMPTS[:2], text_of(family))
    text = family.collate_text(short)
    longest = max(len(e["encoder_hidden_states"]) for e in short)
    assert text["encoder_attention_mask"].shape == (2, longest)
    noisy, sigmas = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        ours = family.predict(parts["transformer"], noisy, sigmas, text)
        padded = parts["transformer"](
            noisy,
            encoder_hidden_states=expected["states"][:2],
            encoder_attention_mask=expected["mask"][:2],
            timestep=1000 * sigmas,
            return_dict=False,
        )[0]
    torch.testing.assert_close(ours, padded, rtol=1e-5, atol=1e-6)


def encode_one(
    family: Family, parts: dict[str, Any], prompt: str, negative: bool
) -> list[TextEmbedding]:
    return encode_prompts(family, parts, [prompt], text_of(family), negative=negative)


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_pictures_are_the_stock_pipeline_s_bit_for_bit(pipeline: Path, guidance: float) -> None:
    family, parts, stock = opened(pipeline)
    options: dict[str, Any] = {"width": 96, "height": 64, "num_inference_steps": 3}
    if family.card.name == "sana":
        options["use_resolution_binning"] = False
    seeds = [7, 8]
    expected = [
        stock(
            PROMPTS[0],
            negative_prompt="blurry",
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
            **options,
        ).images[0]
        for seed in seeds
    ]
    wanted = encode_one(family, parts, PROMPTS[0], False)
    unwanted = encode_one(family, parts, "blurry", True)
    parts = {k: v for k, v in parts.items() if k in ("transformer", "vae", "scheduler")}
    drawn = {"width": 96, "height": 64, "guidance": guidance, "steps": 3}
    found = [sample(family, parts, wanted[0], unwanted[0], **drawn, seed=seed) for seed in seeds]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.size == (96, 64)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert not np.array_equal(np.asarray(found[0]), np.asarray(found[1]))


def test_pictures_in_bfloat16_are_the_stock_pipeline_s(tiny_sd3: Path) -> None:
    family, parts, stock = opened(tiny_sd3, "bfloat16")
    expected = stock(
        PROMPTS[0],
        width=64,
        height=64,
        num_inference_steps=2,
        generator=torch.Generator("cpu").manual_seed(1),
    ).images[0]
    wanted, unwanted = (
        encode_one(family, parts, p, n) for p, n in ((PROMPTS[0], False), ("", True))
    )
    sampled = {"width": 64, "height": 64, "guidance": 7.0, "steps": 2, "seed": 1}
    ours = sample(family, parts, wanted[0], unwanted[0], **sampled)
    assert np.array_equal(np.asarray(ours), np.asarray(expected))
    parts["vae"] = copy.deepcopy(parts["vae"]).float()  # the stock pipeline can't do that
    ours = sample(family, parts, wanted[0], unwanted[0], **sampled)
    difference = np.asarray(ours).astype(int) - np.asarray(expected)
    assert 0 < np.abs(difference).max() < 16


def test_sampling_leaves_the_model_as_it_was(tiny_sana: Path) -> None:
    family, parts, _ = opened(tiny_sana)
    parts["transformer"].train()
    embedding = encode_one(family, parts, "a dog", False)
    state = torch.get_rng_state()
    drawn = {"width": 32, "height": 32, "guidance": 1.0, "steps": 1, "seed": 0}
    sample(family, parts, embedding[0], embedding[0], **drawn)
    assert parts["transformer"].training
    assert torch.equal(state, torch.get_rng_state())


def test_latents_follow_the_formulas(pipeline: Path) -> None:
    family, parts, _ = opened(pipeline)
    vae = parts["vae"]
    pixels = torch.rand(2, 3, 64, 96) * 2 - 1
    cached = family.encode_pixels(vae, pixels)
    noise = torch.randn_like(cached["mean"])
    latents = family.latents(cached, dict(vae.config), noise)
    assert latents.shape == (2, vae.config.latent_channels, 8, 12)
    with torch.no_grad():
        encoded = vae.encode(pixels)
    if family.card.name == "sana":
        expected = encoded.latent.double() * 0.41407
        assert set(cached) == {"mean"}
    else:
        posterior = encoded.latent_dist
        drawn = posterior.mean.double() + torch.exp(posterior.logvar.double() / 2) * noise.double()
        expected = (drawn - 0.0609) * 1.5305
        mean = family.latents(cached, dict(vae.config), None)
        torch.testing.assert_close(
            mean.double(), (posterior.mean.double() - 0.0609) * 1.5305, rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(latents.double(), expected, rtol=1e-5, atol=1e-6)


def tiny_of(name: str, request: pytest.FixtureRequest) -> Path:
    """The session's own tiny pipelines of the first two families, fresh ones of others."""
    if name in ("sana", "sd3"):
        folder: Path = request.getfixturevalue(f"tiny_{name}")
        return folder
    return make_tiny(name, request.getfixturevalue("tmp_path"))


@pytest.mark.parametrize("name", list(MODULES))
def test_random_weights_are_a_function_of_the_seed(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder = tiny_of(name, request)
    family, model = family_of(name), tiny_model(name, folder, init="random")
    trained = family.card.trained_component

    def weights(seed: int) -> Tensor:
        torch.rand(seed + 1)  # the history of torch's generator must not matter
        built = family.load(model, trained, torch.float32, CPU, seed=seed)
        return torch.cat([p.flatten() for p in built.parameters()])

    before = torch.get_rng_state()
    family.load(model, trained, torch.float32, CPU, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    saved = family.load(tiny_model(name, folder), trained, torch.float32, CPU)
    assert not torch.equal(torch.cat([p.flatten() for p in saved.parameters()]), weights(1))


@pytest.mark.parametrize("name", list(MODULES))
def test_example_batches_fit_the_model(name: str, request: pytest.FixtureRequest) -> None:
    folder = tiny_of(name, request)
    family, model = family_of(name), tiny_model(name, folder)
    for device in (CPU, torch.device("meta")):
        batch = family.example_batch(model, 64, 96, 2, text_of(family), device)
        empty = family.empty(model, family.card.trained_component, torch.float32, device)
        assert next(empty.parameters()).device.type == device.type
        found = family.predict(empty, batch.latents, batch.sigmas, batch.text)
        assert found.shape == batch.latents.shape == (2, 4, 12, 8)
        tokens = batch.text["encoder_hidden_states"].shape[1]
        joined = {"sana": 300, "sd3": 77 + 256}
        assert tokens == joined.get(name, family.card.prompt_length)


@pytest.mark.parametrize("name", list(MODULES))
def test_empty_components_have_the_saved_shapes(name: str, request: pytest.FixtureRequest) -> None:
    folder = tiny_of(name, request)
    family, model = family_of(name), tiny_model(name, folder)
    for component in (family.card.trained_component, "vae", *family.card.text_encoders):
        empty = family.empty(model, component, torch.bfloat16, torch.device("meta"))
        loaded = family.load(model, component, torch.bfloat16, CPU)
        shapes = {n: (p.shape, p.dtype) for n, p in loaded.named_parameters()}
        assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == shapes


def test_the_same_seed_makes_the_same_tiny_pipeline(
    tmp_path: Path, tiny_sana: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "MADE", {})
    again = make_tiny("sana", tmp_path)
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (again / file).read_bytes() == (tiny_sana / file).read_bytes()
