"""LoRA on quantised bases: gradients, training, resume, export, merging."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compiler.plan import Layout, Model, Precision, Quantisation, Text
from compiler.quantisers import QUANTISERS
from runtime.build import Built, build, load_state, state
from runtime.families import family_of
from runtime.families.base import Family
from runtime.methods import lora
from runtime.quantise.layers import plain, quantised_layers
from runtime.step import gradient_norm, micro_step, update
from tests.runtime.methods.test_methods import FP32, MIXED, adapter_of, ours, shake, theirs
from tests.runtime.quantise.test_loading import quantised_model
from tests.runtime.replay import OBJECTIVE
from tests.runtime.test_step import batch
from tests.runtime.tiny import tiny_model

CPU = torch.device("cpu")
KINDS = tuple(QUANTISERS)
FAMILIES = ("sana", "sd3")


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


def made(
    folder: Path,
    kind: Quantisation,
    precision: Precision = FP32,
    *,
    every: int = 0,
    seed: int = 0,
    **adapter: Any,
) -> tuple[Family, Model, Built]:
    family, model = family_of(folder.name), quantised_model(folder, "transformer", kind)
    layout = Layout(activation_checkpointing=every)
    adapted = adapter_of(folder.name, "all-linear", **adapter)
    return (
        family,
        model,
        build(model, adapted, precision, layout, family, CPU, empty=False, seed=seed),
    )


def unpacked(built: Built) -> Built:
    """The same on plain layers that hold the dequantised weights."""
    other = copy.deepcopy(built)
    for name, layer in list(quantised_layers(other.model)):
        other.model.set_submodule(name, plain(layer))
    return other


def losses(family: Family, built: Built, precision: Precision, steps: int = 1) -> list[float]:
    """Train `steps` steps on one batch."""
    optimizer = torch.optim.AdamW(built.trainable.values(), lr=1e-2)
    found = []
    for _ in range(steps):
        torch.manual_seed(0)  # dropout
        loss = micro_step(family, built.model, batch(family.card.name, 2), OBJECTIVE, precision, 2)
        found.append(loss.mean().item())
        update(optimizer, gradient_norm(built.trainable.values()), 1.0)
    return found


def gradients(family: Family, built: Built, precision: Precision) -> dict[str, Tensor]:
    torch.manual_seed(0)
    micro_step(family, built.model, batch(family.card.name, 2), OBJECTIVE, precision, 2)
    found = {name: p.grad for name, p in built.trainable.items()}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_on_the_dequantised_weight(folder: Path, kind: Quantisation) -> None:
    """Against plain layers with that weight: the same kernels, so the same bits."""
    family, _, built = made(folder, kind)
    shake(built)
    ours, expected = (gradients(family, b, FP32) for b in (built, unpacked(built)))
    assert len(list(quantised_layers(built.model))) > 10
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_bfloat16_are_near_those_in_float32(folder: Path, kind: Quantisation) -> None:
    family, _, half = made(folder, kind, MIXED)
    _, _, single = made(folder, kind, FP32)
    shake(single)
    load_state(half, state(single))
    ours, exact = gradients(family, half, MIXED), gradients(family, single, FP32)
    both = [torch.cat([g[name].flatten() for name in exact]) for g in (ours, exact)]
    # float32 weights are quantised to other codes than bfloat16 ones: one step of a 4-bit code.
    limit = 0.1 if QUANTISERS[kind].bits == 8 else 0.2
    assert (both[0] - both[1]).norm() < limit * both[1].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_changes_no_gradient(folder: Path, kind: Quantisation) -> None:
    found = []
    for every in (0, 1):
        family, _, built = made(folder, kind, MIXED, every=every, dropout=0.2)
        shake(built)
        found.append(gradients(family, built, MIXED))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


TOLERANCES: dict[str, tuple[float, float]] = {
    "int8": (0.01, 0.03),
    "fp8": (0.03, 0.03),
    "int4": (0.1, 0.05),
    "nf4": (0.1, 0.05),
}
"""By kind: how far predictions may be from the plain base's (norm of the difference over the
norm), and the loss after training (relative)."""


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_near_that_on_the_plain_base(folder: Path, kind: Quantisation) -> None:
    ahead, after = TOLERANCES[kind]
    family, _, built = made(folder, kind)
    _, _, whole = made(folder, "none")
    example = batch(folder.name, 2)
    with torch.no_grad():
        predictions = [
            family.predict(b.model, example.latents, example.sigmas, example.text)
            for b in (built, whole)
        ]
    difference = (predictions[0] - predictions[1]).norm() / predictions[1].norm()
    assert 0 < difference < ahead
    found, expected = losses(family, built, FP32, 8), losses(family, whole, FP32, 8)
    assert found[-1] < found[0]
    assert found[-1] == pytest.approx(expected[-1], rel=after)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted(folder: Path, kind: Quantisation) -> None:
    _, _, built = made(folder, kind)
    _, _, whole = made(folder, "none")
    assert built.parameters == whole.parameters
    assert built.adapted_modules == whole.adapted_modules
    assert built.trainable.keys() == whole.trainable.keys()
    start = state(whole)
    assert all(torch.equal(value, start[name]) for name, value in state(built).items())


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_is_as_if_never_stopped(folder: Path, kind: Quantisation) -> None:
    family, _, built = made(folder, kind, MIXED, dropout=0.1)
    expected = losses(family, built, MIXED, 6)
    _, _, stopped = made(folder, kind, MIXED, dropout=0.1)
    losses(family, stopped, MIXED, 3)
    _, _, again = made(folder, kind, MIXED, dropout=0.1, seed=1)
    load_state(again, {name: value.clone() for name, value in state(stopped).items()})
    for (name, one), (_, other) in zip(
        quantised_layers(again.model), quantised_layers(built.model), strict=True
    ):
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales), name
    assert all(torch.equal(v, state(again)[name]) for name, v in state(stopped).items())
    assert losses(family, again, MIXED, 1) == losses(family, stopped, MIXED, 1)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_loads_in_diffusers_on_the_plain_base(
    folder: Path, kind: Quantisation, tmp_path: Path
) -> None:
    family, model, built = made(folder, kind)
    shake(built)
    lora.export(built, model, family, tmp_path)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * built.adapted_modules
    _, _, whole = made(folder, "none")
    load_state(whole, state(built))
    picture = theirs(folder, tmp_path)
    assert np.abs(ours(family, model, whole) - picture).max() <= 1
    apart = np.abs(ours(family, model, built) - picture)
    assert apart.mean() < (4 if QUANTISERS[kind].bits == 8 else 16)  # of 255


@pytest.mark.parametrize(("kind", "precision"), [*((kind, FP32) for kind in KINDS), ("nf4", MIXED)])
def test_merging_adds_to_the_dequantised_weight(
    folder: Path, kind: Quantisation, precision: Precision
) -> None:
    """Against the formula in float64, and against peft's own merging of a plain model."""
    family, model, built = made(folder, kind, precision)
    shake(built)
    found = dict(lora.merged(built, dtype=torch.float32))
    stock: Any = diffusers.DiffusionPipeline.from_pretrained(folder).transformer
    assert found.keys() == stock.state_dict().keys()
    layers = dict(quantised_layers(built.model))
    values = state(built)
    for name, layer in layers.items():
        name = name.removesuffix(".base_layer")
        weight = layer.dequantised(torch.float32).double()
        key = f"{name}.lora_{{}}.default.weight"
        if key.format("A") in values:
            a, b = (values[key.format(which)].double().flatten(1) for which in "AB")
            weight = weight + 10 / 4 * (b @ a)  # alpha / rank
        torch.testing.assert_close(
            found[f"{name}.weight"].flatten(1).double(), weight, rtol=1e-5, atol=1e-6
        )
    if precision is FP32:
        merged = ours(family, model, built)
        stock.load_state_dict(found)
        alone = Built(model=stock, trainable={}, parameters=0, adapted_modules=0)
        assert np.abs(ours(family, model, alone) - merged).max() <= 1


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_peft_merges_the_same(folder: Path, kind: Quantisation) -> None:
    """In place by peft, as `fuse_lora` does; a quantised layer becomes a plain one."""
    _, _, built = made(folder, kind)
    shake(built)
    expected = dict(lora.merged(built))
    adapted: Any = copy.deepcopy(built.model)
    adapted.fuse_lora()
    for name, value in adapted.state_dict().items():
        plain_name = name.replace(".base_layer", "")
        if ".lora_" not in name and plain_name in expected:
            torch.testing.assert_close(value, expected[plain_name], rtol=1e-5, atol=1e-5)
    left = {name for name, _ in quantised_layers(adapted)}  # those without adapter
    assert left == {name for name, _ in quantised_layers(built.model) if "base_layer" not in name}
    adapted.unfuse_lora()


def test_a_full_fine_tune_of_quantised_weights_is_refused(tiny_sana: Path) -> None:
    family, model = family_of("sana"), quantised_model(tiny_sana, "transformer", "int8")
    with pytest.raises(ValueError, match="quantised weights can't be trained"):
        build(model, None, FP32, Layout(), family, CPU, empty=False, seed=0)


def test_prompts_through_quantised_encoders(folder: Path) -> None:
    """int8 encoders give embeddings within 3 % of the plain ones."""
    family = family_of(folder.name)
    text = Text(max_length=32, instruction=family.card.instruction[:1])
    for name in family.card.text_encoders:
        found = []
        for kind in ("none", "int8"):
            model = (
                quantised_model(folder, name, kind)
                if kind != "none"
                else tiny_model(folder.name, folder)
            )
            parts = {
                part: family.load(model, part, torch.float32, CPU)
                for part in family.card.components
                if part == name or part.startswith("tokenizer")
            }
            (share,) = family.encode_with(name, parts, ["a red dog"], text)
            found.append(share)
        for key, value in found[0].items():
            assert 0 < (found[1][key] - value).norm() < 0.03 * value.norm()
