"""What training leaves behind, loaded by plain Diffusers; and what it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from compiler.plan import Adapter, Layout, Model, Precision, Text
from runtime.build import Built, build, load_state, state
from runtime.families import family_of
from runtime.families.base import Family
from runtime.families.common import encode_prompts, sample
from runtime.methods import full, lora
from tests.runtime.tiny import tiny_model

CPU = torch.device("cpu")
FP32 = Precision(compute="float32", weights="float32", trained="float32", cache="float32")
MIXED = evolve(FP32, compute="bfloat16", weights="bfloat16")
PROMPT = "a red dog"


@pytest.fixture(params=["sana", "sd3"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


def adapter_of(name: str, targets: str = "attention", **changes: Any) -> Adapter:
    found = Adapter(
        kind="lora",
        rank=4,
        alpha=10.0,  # not the rank: a file without it would load too weak
        dropout=0.0,
        init="gaussian",
        targets=family_of(name).card.target_sets[targets],
    )
    return evolve(found, **changes)


def made(
    folder: Path, adapter: Adapter | None, precision: Precision = FP32, seed: int = 0
) -> tuple[Family, Model, Built]:
    family, model = family_of(folder.name), tiny_model(folder.name, folder)
    return (
        family,
        model,
        build(model, adapter, precision, Layout(), family, CPU, empty=False, seed=seed),
    )


@torch.no_grad()
def shake(built: Built) -> None:
    """As if trained: every weight moves."""
    generator = torch.Generator().manual_seed(1)
    for parameter in built.trainable.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def ours(family: Family, model: Model, built: Built) -> np.ndarray[Any, Any]:
    names = [name for name in family.card.components if name != "transformer"]
    parts = {name: family.load(model, name, torch.float32, CPU) for name in names}
    text = Text(max_length=family.card.prompt_length, instruction=family.card.instruction)
    picture = sample(
        family,
        {**parts, "transformer": built.model},
        encode_prompts(family, parts, [PROMPT], text)[0],
        encode_prompts(family, parts, [""], text, negative=True)[0],
        width=64,
        height=64,
        guidance=5.0,
        steps=2,
        seed=5,
    )
    return np.asarray(picture).astype(int)


def theirs(folder: Path, adapter: Path | None = None) -> np.ndarray[Any, Any]:
    """By plain Diffusers."""
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    options = {"use_resolution_binning": False} if "Sana" in type(pipeline).__name__ else {}
    picture: Image.Image = pipeline(
        PROMPT,
        width=64,
        height=64,
        guidance_scale=5.0,
        num_inference_steps=2,
        generator=torch.Generator("cpu").manual_seed(5),
        **options,
    ).images[0]
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_an_adapter_loads_at_its_strength(folder: Path, targets: str, tmp_path: Path) -> None:
    family, model, built = made(folder, adapter_of(folder.name, targets))
    untrained = ours(family, model, built)
    assert np.abs(untrained - theirs(folder)).max() == 0  # B is zero
    shake(built)
    lora.export(built, model, family, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    trained = ours(family, model, built)
    assert np.abs(trained - untrained).max() > 5
    assert np.abs(trained - theirs(folder, tmp_path)).max() <= 1


def test_an_adapter_file_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    family, model, built = made(folder, adapter_of(folder.name))
    lora.export(built, model, family, tmp_path, dtype=torch.bfloat16)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        stored = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert stored["transformer.lora_alpha"] == 10 and stored["transformer.r"] == 4
    tensors = load_file(file)
    assert len(tensors) == len(built.trainable) == 2 * built.adapted_modules
    assert all(key.startswith("transformer.transformer_blocks.") for key in tensors)
    assert all(value.dtype == torch.bfloat16 for value in tensors.values())


def test_another_average_can_be_exported(folder: Path, tmp_path: Path) -> None:
    family, model, built = made(folder, adapter_of(folder.name))
    average = {name: torch.full_like(value, 0.5) for name, value in state(built).items()}
    lora.export(built, model, family, tmp_path, weights=average)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all((value == 0.5).all() for value in tensors.values())
    with pytest.raises(ValueError, match="is missing"):
        lora.export(built, model, family, tmp_path, weights={})


@pytest.mark.parametrize("precision", [FP32, MIXED], ids=["fp32", "mixed"])
def test_a_full_result_is_a_pipeline(folder: Path, precision: Precision, tmp_path: Path) -> None:
    family, model, built = made(folder, None, precision)
    shake(built)
    full.export(built, model, family, tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {p.name for p in folder.iterdir()}
    saved = load_file(tmp_path / "model/transformer/diffusion_pytorch_model.safetensors")
    for name, value in state(built).items():
        assert torch.equal(saved[name], value)
    picture = theirs(tmp_path / "model")
    assert np.abs(picture - theirs(folder)).max() > 5
    if precision is FP32:
        assert np.abs(picture - ours(family, model, built)).max() == 0
    config = (tmp_path / "model/transformer/config.json").read_text()
    kept = {k: v for k, v in json.loads(config).items() if not k.startswith("_")}
    original = json.loads(model.configs["transformer"])
    assert kept == {k: v for k, v in original.items() if not k.startswith("_")}


def test_a_full_result_can_be_saved_smaller(folder: Path, tmp_path: Path) -> None:
    family, model, built = made(folder, None)
    full.export(built, model, family, tmp_path, dtype=torch.bfloat16)
    file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}
    assert {p.dtype for p in built.trainable.values()} == {torch.float32}
    assert not next(iter(built.trainable.values())).is_meta


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
@pytest.mark.parametrize("precision", [FP32, MIXED], ids=["fp32", "mixed"])
def test_an_adapter_s_start(folder: Path, init: str, precision: Precision) -> None:
    adapter = adapter_of(folder.name, init=init, rank=8)

    def start(seed: int) -> dict[str, Tensor]:
        torch.rand(seed + 1)  # history that must not matter
        return state(made(folder, adapter, precision, seed)[2])

    one, again, other = start(0), start(0), start(1)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert all((value == 0).all() for name, value in one.items() if "lora_B" in name)
    a = {name: value for name, value in one.items() if "lora_A" in name}
    assert all(not torch.equal(value, other[name]) for name, value in a.items())
    assert len({value.sum().item() for value in a.values()}) == len(a)
    if init == "gaussian":
        drawn = torch.cat([v.flatten() for v in a.values()])
        assert drawn.std().item() == pytest.approx(1 / 8, rel=0.1)
    for value in a.values():
        if init == "kaiming":
            assert value.abs().max() <= value.shape[1] ** -0.5


def test_the_start_does_not_depend_on_what_else_is_adapted(tiny_sana: Path) -> None:
    small = state(made(tiny_sana, adapter_of("sana"))[2])
    large = state(made(tiny_sana, adapter_of("sana", "all-linear"))[2])
    assert small.keys() < large.keys()
    assert all(torch.equal(value, large[name]) for name, value in small.items())


def test_only_the_adapter_is_trained(folder: Path) -> None:
    family, model, built = made(folder, adapter_of(folder.name))
    wanted = {n for n, p in built.model.named_parameters() if p.requires_grad}
    assert set(built.trainable) == wanted
    assert all(".lora_A.default.weight" in n or ".lora_B.default.weight" in n for n in wanted)
    fresh = family.load(model, "transformer", torch.float32, CPU)
    assert built.parameters == sum(p.numel() for p in fresh.parameters())
    assert built.model.training


@pytest.mark.parametrize("pattern", ["transformer_blocks.9.*", "to_q", r".*norm\d", ".*attn1"])
def test_a_pattern_that_matches_nothing_is_named(tiny_sana: Path, pattern: str) -> None:
    adapter = adapter_of("sana")
    adapter = evolve(adapter, targets=(*adapter.targets, pattern))
    with pytest.raises(ValueError) as caught:
        made(tiny_sana, adapter)
    assert f"`{pattern}` matches none of the 37 linear layers" in str(caught.value)


def test_a_pattern_of_convolutions_alone_is_told() -> None:
    """Rotations of inputs have no form for kernels; a LoRA does."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Conv2d(4, 4, 1))
    assert lora.matching(model, ("0",), kernels=True) == ["0"]
    with pytest.raises(ValueError) as caught:
        lora.matching(model, ("0",))
    assert "matches none of the 2 linear layers; it matches 1 convolutions of" in str(caught.value)
    with pytest.raises(ValueError, match=r"2 linear layers$"):
        lora.matching(model, ("nope",))


def test_weights_can_be_set_and_read(folder: Path) -> None:
    for adapter in (None, adapter_of(folder.name)):
        for precision in (FP32, MIXED):
            _, _, built = made(folder, adapter, precision)
            shake(built)
            kept = {name: value.clone() for name, value in state(built).items()}
            _, _, other = made(folder, adapter, precision, seed=1)
            load_state(other, kept)
            assert all(torch.equal(value, kept[name]) for name, value in state(other).items())
            with pytest.raises(ValueError, match="stranger is not trained here"):
                load_state(other, {**kept, "stranger": torch.zeros(1)})


@pytest.mark.parametrize(
    ("adapter", "change", "message"),
    [
        (True, {"weights": "bfloat16"}, "can't compute in float32"),
        (False, {"trained": "float16"}, "float16 weights can't be trained"),
    ],
)
def test_number_formats_that_do_not_go_together(
    tiny_sana: Path, adapter: bool, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(tiny_sana, adapter_of("sana") if adapter else None, evolve(FP32, **change))


def test_random_weights_start_from_the_seed(tiny_sana: Path) -> None:
    family = family_of("sana")
    model = tiny_model("sana", tiny_sana, init="random")
    built = [
        state(build(model, None, FP32, Layout(), family, CPU, empty=False, seed=seed))
        for seed in (0, 0, 1)
    ]
    name = "patch_embed.proj.weight"
    assert torch.equal(built[0][name], built[1][name])
    assert not torch.equal(built[0][name], built[2][name])
