"""Norms that are trained beside an adapter: by hand, and as LyCORIS and ComfyUI read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from torch import nn

from compiler.adapters import AdapterKind
from runtime.families import family_of
from runtime.methods import lora
from tests.runtime.methods.test_kinds import (
    adapter_of,
    apart,
    by_lycoris,
    made,
    output,
    plain,
    shake,
)
from tests.runtime.tiny import make_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("sd", tmp_path_factory.mktemp("norms") / "sd")


@pytest.mark.parametrize("kind", ["lokr", "loha", "glora", "full"])
def test_norms_are_trained_and_load(base: Path, kind: AdapterKind, tmp_path: Path) -> None:
    adapter = adapter_of(kind, "sd", train_norm=True)
    _, model, built = made(base, adapter)
    untrained = plain(base)
    norms = {
        name: module
        for name, module in untrained.named_modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm)
    }
    moved = [name for name in built.trainable if ".norm_w." in name or ".norm_b." in name]
    assert len(norms) > 8 and len(moved) == 2 * len(norms)
    assert apart(output(built.model, "sd"), output(untrained, "sd")) < 2e-6
    shake(built)
    trained, found = output(built.model, "sd"), dict(lora.merged(built))
    for name, module in norms.items():
        for part, before in (("w", module.weight), ("b", module.bias)):
            leaf = {"w": "weight", "b": "bias"}[part]
            step = built.trainable[f"{name}.norm_{part}.default"].detach().double()
            assert apart(found[f"{name}.{leaf}"], before.detach().double() + step) < 1e-7
    stock = plain(base)
    stock.load_state_dict(found)
    assert apart(output(stock, "sd"), trained) < 5e-6
    lora.export(built, model, family_of("sd"), tmp_path)
    file = tmp_path / "lycoris.safetensors"
    stored: Any = load_file(file)
    assert "lycoris_conv_norm_out.w_norm" in stored and "lycoris_conv_norm_out.b_norm" in stored
    assert apart(output(by_lycoris(base, tmp_path), "sd"), trained) < 1e-5
    _, _, loaded = made(base, evolve(adapter, start=str(file)))
    assert apart(output(loaded.model, "sd"), trained) < 2e-6


def test_gradients_reach_weight_and_bias(base: Path) -> None:
    """Of a group norm: those of its own weight and bias, by autograd on the plain layer."""
    _, _, built = made(base, adapter_of("full", "sd", train_norm=True))
    layer: Any = built.model.get_submodule("conv_norm_out")
    x = torch.randn(2, layer.base_layer.num_channels, 3, 3)
    layer(x).square().sum().backward()
    alone = plain(base).get_submodule("conv_norm_out")
    alone(x).square().sum().backward()
    assert torch.equal(layer.norm_w["default"].grad, alone.weight.grad)  # type: ignore[union-attr,arg-type]
    assert torch.equal(layer.norm_b["default"].grad, alone.bias.grad)  # type: ignore[union-attr,arg-type]


def test_a_model_without_such_norms_is_refused(tmp_path: Path) -> None:
    folder = make_tiny("sd3", tmp_path / "sd3")
    with pytest.raises(ValueError, match="no layer norm or group norm with a weight"):
        made(folder, adapter_of("lokr", "sd3", train_norm=True))
