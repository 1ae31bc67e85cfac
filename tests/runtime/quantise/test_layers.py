"""Quantised layers against plain ones that hold the dequantised weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compiler.plan import Quantisation
from compiler.quantisers import QUANTISERS
from runtime.quantise.layers import (
    QuantisedConv2d,
    QuantisedLinear,
    eligible,
    hollow,
    num_weights,
    plain,
    quantise,
    quantised_layers,
)

CPU, META = torch.device("cpu"), torch.device("meta")
KINDS = tuple(QUANTISERS)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 24)
        self.point = nn.Conv2d(24, 56, 1, bias=False)
        self.wide = nn.Conv2d(56, 56, 3, padding=1, groups=56)
        self.norm = nn.LayerNorm(40)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, 40)
        mixed: Tensor = self.wide(self.point(self.linear(self.norm(x)).movedim(-1, 1)))
        return mixed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 40)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.out = nn.Conv2d(56, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embed(x)
        result: Tensor = self.out(sum(block(embedded) for block in self.blocks))
        return result


def net(kind: Quantisation = "none", seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net().requires_grad_(False)
    if kind != "none":
        quantise(made, kind, CPU, on=CPU)
    return made


def unpacked(model: nn.Module) -> nn.Module:
    """The same model of plain layers."""
    other = copy.deepcopy(model)
    for name, layer in list(quantised_layers(other)):
        other.set_submodule(name, plain(layer))
    return other


def test_matrices_in_blocks_are_quantised_and_nothing_else() -> None:
    model = net()
    names = [f"blocks.{n}.{layer}" for n in (0, 1) for layer in ("linear", "point")]
    assert list(eligible(model)) == names
    before = num_weights(model)
    quantise(model, "int8", CPU, on=CPU)
    assert [name for name, _ in quantised_layers(model)] == names
    assert list(eligible(model)) == []
    assert num_weights(model) == before
    assert isinstance(model.blocks[0].linear, nn.Linear)
    assert isinstance(model.blocks[0].point, nn.Conv2d)
    assert "int8" in repr(model.blocks[0].linear) and "in_features=40" in repr(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_weight(
    kind: Quantisation, dtype: torch.dtype
) -> None:
    """Bit for bit: the same kernels on the same numbers."""
    ours = net(kind).to(dtype)
    theirs = unpacked(ours)
    x = torch.randn(2, 5, 4, 8).to(dtype)
    found = []
    for model in (ours, theirs):
        model.embed.weight.requires_grad_(True)
        y = model(x)
        (y.float() ** 2).sum().backward()
        found.append((y.detach(), model.embed.weight.grad))
    assert found[0][0].dtype == dtype
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind: Quantisation) -> None:
    for name, shape in (("linear", (3, 40)), ("point", (2, 24, 3, 2))):
        layer = net(kind).blocks[0].get_submodule(name)
        x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        layer.bias = None if layer.bias is None else nn.Parameter(layer.bias.double(), False)
        assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_for_the_backward_pass(kind: Quantisation) -> None:
    layer = net(kind).blocks[0].linear
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 40, requires_grad=True)).sum().backward()
    assert kept == []


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_changes_nothing(kind: Quantisation) -> None:
    model = net(kind)
    gradients = []
    for recomputed in (False, True):
        x = torch.randn(2, 3, 3, 40, generator=torch.Generator().manual_seed(1))
        x.requires_grad_(True)
        block: Any = model.blocks[0]
        y = checkpoint(block, x, use_reentrant=False) if recomputed else block(x)
        y.pow(2).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_casts_copies_and_state_dicts_keep_the_weight(kind: Quantisation) -> None:
    model = net(kind)
    weights = {n: layer.dequantised(torch.float32) for n, layer in quantised_layers(model)}
    copied = copy.deepcopy(model).to(torch.bfloat16)
    for name, layer in quantised_layers(copied):
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.dequantised(torch.float32), weights[name])
    other = net(kind, seed=1)
    missing = other.load_state_dict(model.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    for name, layer in quantised_layers(other):
        assert torch.equal(layer.dequantised(torch.float32), weights[name])
    assert {type(value) for value in model.state_dict().values()} == {Tensor}


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_model_has_the_form_of_a_real_one(kind: Quantisation) -> None:
    real = net(kind)
    with META:
        meta = Net()
        hollow(meta, kind, META)
        predicted = meta(torch.randn(2, 5, 4, 8))
    assert predicted.shape == real(torch.randn(2, 5, 4, 8)).shape
    tensors = {**dict(real.named_parameters()), **dict(real.named_buffers())}
    empty = {**dict(meta.named_parameters()), **dict(meta.named_buffers())}
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in empty.items()
    }
    assert all(tensor.is_meta for tensor in empty.values())


@pytest.mark.parametrize("kind", KINDS)
def test_held_bytes_are_the_table_s(kind: Quantisation) -> None:
    for _, layer in quantised_layers(net(kind)):
        assert layer.codes.nbytes + layer.scales.nbytes == QUANTISERS[kind].weight_bytes(
            *layer.shape
        )
        assert layer.form.nbytes == 0
        assert layer.levels is None or layer.levels.nbytes == 2048  # the same for every layer


def test_a_weight_can_not_be_set_unnoticed() -> None:
    for layer in (net("int8").blocks[0].linear, net("int8").blocks[0].point):
        assert isinstance(layer, QuantisedLinear | QuantisedConv2d)
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = nn.Parameter(torch.zeros(1))
        with pytest.raises(RuntimeError, match="floating point"):
            layer.requires_grad_(True)
