"""LoKr and LoHa with the lengths of rows apart: by the formula, and as LyCORIS and ComfyUI read
them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from compiler.adapters import AdapterKind
from runtime.export import dora
from runtime.export.base import base_tensors
from runtime.families import family_of
from runtime.methods import lora
from runtime.methods.kinds import parts_of
from tests.runtime.methods.test_kinds import (
    FORMULAS,
    adapter_of,
    apart,
    by_lycoris,
    made,
    output,
    plain,
    shake,
)
from tests.runtime.tiny import make_tiny

KINDS: tuple[AdapterKind, ...] = ("lokr", "loha")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("decomposed")

    def base(family: str) -> Path:
        if not (folder / family).exists():
            make_tiny(family, folder / family)
        return folder / family

    return base


def decomposed(weight: Tensor, held: dict[str, Tensor], kind: AdapterKind) -> Tensor:
    """The paper's m V / |V|, in float64, (outputs, inputs); V as of the kind without lengths."""
    v = FORMULAS[kind](weight, {part: t for part, t in held.items() if part != "dora_scale"})
    return held["dora_scale"].view(-1, 1) * v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sana", "sd"])
def test_the_model_computes_by_the_formula_and_its_file_loads(
    bases: Callable[[str], Path], kind: AdapterKind, family: str, tmp_path: Path
) -> None:
    folder = bases(family)
    targets = family_of(family).card.target_sets["all-linear"]
    if family == "sd":
        targets += (r"down_blocks\.0\.resnets\.0\.conv\d",)
    adapter = adapter_of(kind, family, weight_decompose=True, targets=targets)
    _, model, built = made(folder, adapter)
    untrained = output(plain(folder), family)
    assert apart(output(built.model, family), untrained) < 5e-6
    shake(built)
    trained = output(built.model, family)
    assert apart(trained, untrained) > 0.05
    found, base = dict(lora.merged(built)), plain(folder).state_dict()
    for module, parts in parts_of(list(built.trainable)).items():
        held = {part: built.trainable[name].detach().double() for part, name in parts.items()}
        weight = base[f"{module}.weight"].double()
        expected = decomposed(weight.flatten(1), held, kind).view(weight.shape)
        assert apart(found[f"{module}.weight"], expected) < 5e-6, module
    stock = plain(folder)
    stock.load_state_dict(found)
    assert apart(output(stock, family), trained) < 2e-5
    lora.export(built, model, family_of(family), tmp_path)
    assert any(key.endswith(".dora_scale") for key in load_file(tmp_path / "lycoris.safetensors"))
    assert apart(output(by_lycoris(folder, tmp_path), family), trained) < 2e-5
    again = evolve(adapter, start=str(tmp_path / "lycoris.safetensors"), alpha=1.5)
    _, _, loaded = made(folder, again)
    assert apart(output(loaded.model, family), trained) < 5e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", ["attn1.to_q", "ff.conv_inverted"])
def test_gradients_are_those_of_the_formula_with_fixed_norms(
    bases: Callable[[str], Path], kind: AdapterKind, module: str
) -> None:
    """In float64 by autograd, on a linear layer and a 1x1 convolution: the norm is a constant, as
    in the paper's section 4.3."""
    name = f"transformer_blocks.0.{module}"
    _, _, built = made(bases("sana"), adapter_of(kind, "sana", weight_decompose=True))
    built.model.double()
    shake(built)
    layer: Any = built.model.get_submodule(name)
    parts = parts_of(list(built.trainable))[name]
    leaves = {part: built.model.get_parameter(full) for part, full in parts.items()}
    weight = layer.base_layer.weight.detach()
    x = torch.randn(2, weight.shape[1], 3, 3, dtype=torch.float64)
    x = x if weight.ndim == 4 else x.flatten(2).transpose(1, 2)
    grown = layer(x)
    grown.square().sum().backward()
    ours = {part: leaf.grad.clone() for part, leaf in leaves.items()}
    copies = {part: leaf.detach().clone().requires_grad_() for part, leaf in leaves.items()}
    plain_parts = {part: t for part, t in copies.items() if part != "dora_scale"}
    v = FORMULAS[kind](weight.flatten(1), plain_parts)
    new = copies["dora_scale"].view(-1, 1) * v / v.detach().norm(dim=1, keepdim=True)
    bias = layer.base_layer.bias
    flat = x if weight.ndim == 2 else x.movedim(1, -1)
    expected = functional.linear(flat, new, bias)
    expected = expected if weight.ndim == 2 else expected.movedim(-1, 1)
    assert apart(grown.detach(), expected.detach()) < 1e-5  # lengths are float32
    expected.square().sum().backward()
    for part, copy in copies.items():
        scale = float(copy.grad.abs().max())  # type: ignore[union-attr]
        assert apart(ours[part], copy.grad) < 1e-5 * max(scale, 1), part  # type: ignore[arg-type]


def test_comfyui_s_formula_makes_the_same_weights(bases: Callable[[str], Path]) -> None:
    """Its rows are multiplied by `dora_scale` over the lengths of the base's own rows
    (comfy/weight_adapter/base.py)."""
    folder = bases("sana")
    _, model, built = made(folder, adapter_of("loha", "sana", weight_decompose=True))
    shake(built)
    found, base = dict(lora.merged(built)), base_tensors(model, 0)
    for module, parts in parts_of(list(built.trainable)).items():
        held = {part: built.trainable[name].detach().double() for part, name in parts.items()}
        weight = base[f"{module}.weight"].read().double().flatten(1)
        without = {part: t for part, t in held.items() if part != "dora_scale"}
        v = FORMULAS["loha"](weight, without)
        updates, lengths = {module: (v - weight).float()}, {module: held["dora_scale"].float()}
        theirs = dora.of_the_base(updates, lengths, base)[module].double()
        shape = found[f"{module}.weight"].shape
        expected = (theirs.view(-1, 1) / weight.norm(dim=1, keepdim=True) * v).view(shape)
        assert apart(found[f"{module}.weight"], expected) < 5e-6
