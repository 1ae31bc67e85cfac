"""Flux.1 in the layouts of other programs, read back by Diffusers' own readers of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file

from compiler.families import FAMILIES
from compiler.plan import Plan
from runtime.export import bfl, lora_keys
from runtime.export.export import export
from runtime.export.lazy import held
from runtime.export.lora_keys import Layer
from runtime.export.request import chosen, requested
from runtime.methods.lora import matching
from tests.runtime.export.runs import PROMPT, pipeline_of

Make = Callable[..., Plan]
CARD = FAMILIES["flux"]
SHALLOW = {**CARD.known[0].configs["transformer"], "num_layers": 1, "num_single_layers": 1}


@pytest.fixture(scope="module")
def published() -> torch.nn.Module:
    """One block of each kind, as wide as the published model, which the readers ask for."""
    with torch.device("meta"):
        model: torch.nn.Module = diffusers.FluxTransformer2DModel.from_config(SHALLOW)
    return model


def test_whole_models_come_back_from_the_published_layout(published: torch.nn.Module) -> None:
    """Its map only moves rows, so two columns of each weight are enough to see it."""
    generator = torch.Generator().manual_seed(0)
    ours = {
        name: torch.randn((*tensor.shape[:1], 2)[: tensor.ndim], generator=generator)
        for name, tensor in published.state_dict().items()
    }
    there = {name: lazy.read() for name, lazy in bfl.laid_out(held(ours), SHALLOW).items()}
    assert there["double_blocks.0.img_attn.norm.query_norm.scale"].shape == (128,)
    assert there["single_blocks.0.linear1.weight"].shape == (7 * 3072, 2)
    back = convert_flux_transformer_checkpoint_to_diffusers(there)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_kohya_keys_are_read_by_diffusers(published: torch.nn.Module, targets: str) -> None:
    """With all parts of a layer there, and with one part of those in `linear1` missing."""
    layers = {}
    for number, module in enumerate(matching(published, CARD.target_sets[targets])):
        generator = torch.Generator().manual_seed(number)
        outputs, inputs = published.get_parameter(f"{module}.weight").shape
        layers[module] = Layer(
            a=torch.randn(2, inputs, generator=generator),
            b=torch.randn(outputs, 2, generator=generator),
            scale=(1.5, 0.5, 1.0)[number % 3],
        )
    file = lora_keys.kohya_flux(layers, SHALLOW)
    assert "lora_unet_single_blocks_0_linear1.alpha" in file
    found = diffusers.FluxPipeline.lora_state_dict(dict(file))
    for module, layer in layers.items():
        a, b = (found.pop(f"transformer.{module}.lora_{which}.weight") for which in "AB")
        probe = torch.randn(layer.a.shape[1], generator=torch.Generator().manual_seed(99))
        ours = layer.scale * (layer.b @ (layer.a @ probe))
        torch.testing.assert_close(b @ (a @ probe), ours, rtol=1e-4, atol=1e-3)
    assert not any(tensor.any() for name, tensor in found.items() if "lora_B" in name)


@pytest.fixture(scope="module")
def plan(runs: Make) -> Plan:
    return runs("flux")


@torch.no_grad()
def drawn(pipeline: Any) -> np.ndarray:
    images = pipeline(
        PROMPT,
        width=64,
        height=64,
        num_inference_steps=3,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="np",
    ).images
    return np.asarray(images[0])


def exported(plan: Plan, out: Path, **options: Any) -> Path:
    return export(requested(chosen(Path(plan.run_folder)), out=out, **options))


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_adapters_and_merged_models_draw_what_the_run_drew(
    plan: Plan, format: str, tmp_path: Path
) -> None:
    own = pipeline_of(plan)
    own.load_lora_weights(Path(plan.run_folder) / "lora")
    picture = drawn(own)
    other = pipeline_of(plan)
    file = exported(plan, tmp_path / "lora.safetensors", format=format)
    other.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert np.abs(drawn(other) - picture).max() < 1e-4
    assert np.abs(drawn(pipeline_of(plan)) - picture).max() > 0.02  # the LoRA shows
    merged = pipeline_of(plan, exported(plan, tmp_path / "merged", merge=True))
    assert np.abs(drawn(merged) - picture).max() < 1e-4


def test_files_say_what_they_are(plan: Plan, tmp_path: Path) -> None:
    lora = exported(plan, tmp_path / "kohya.safetensors", format="kohya")
    keys = load_file(lora).keys()
    assert all(key.startswith(("lora_unet_double_blocks", "lora_unet_single")) for key in keys)
    whole = exported(plan, tmp_path / "whole.safetensors", merge=True, single_file=True)
    assert "double_blocks.1.txt_mlp.2.bias" in load_file(whole)
    for file, kind in ((lora, "flux-1-dev/lora"), (whole, "flux-1-dev")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["modelspec.architecture"] == kind
