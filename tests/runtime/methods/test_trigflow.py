"""Angles, conversions, the forward derivative and the losses of a distillation, against plain
formulas, finite differences and other implementations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.families.sana import velocity
from runtime.methods import trigflow
from runtime.methods.heads import Head, Heads

ANGLES = torch.linspace(0.01, 1.57080, 40, dtype=torch.float64)


def test_a_perfect_flow_gives_the_arc_s_own_direction() -> None:
    """For v = n - x0 the prediction is cos t n - sin t x0, and leads back to x0."""
    torch.manual_seed(0)
    x0, n = torch.randn(2, 40, 3, 2, 2, dtype=torch.float64)
    places: list[tuple[Tensor, Tensor]] = []

    def flow(noisy: Tensor, times: Tensor) -> Tensor:
        places.append((noisy, times))
        return n - x0

    noisy = trigflow.noised(0.5 * x0, 0.5 * n, ANGLES)
    found = trigflow.predict(flow, noisy / 0.5, ANGLES)
    c, s = (f(ANGLES)[:, None, None, None] for f in (torch.cos, torch.sin))
    torch.testing.assert_close(found, c * n - s * x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trigflow.denoised(noisy, found, ANGLES, 0.5), 0.5 * x0)
    ((asked, times),) = places
    tau = (torch.tan(ANGLES) / (1 + torch.tan(ANGLES)))[:, None, None, None]
    torch.testing.assert_close(times, tau.flatten())
    torch.testing.assert_close(asked, (1 - tau) * x0 + tau * n)


def test_the_direction_is_the_derivative_of_the_arc() -> None:
    """d/dt (cos t x0 + sin t z) = s F, by differences."""
    torch.manual_seed(0)
    x0, n = torch.randn(2, 40, 3, 2, 2, dtype=torch.float64)
    at = [trigflow.noised(0.5 * x0, 0.5 * n, ANGLES + step) for step in (1e-6, -1e-6)]
    noisy = trigflow.noised(0.5 * x0, 0.5 * n, ANGLES)
    found = 0.5 * trigflow.predict(lambda *_: n - x0, noisy / 0.5, ANGLES)
    torch.testing.assert_close(found, (at[0] - at[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_angles_are_log_normal() -> None:
    """log(s tan t) ~ N(m, d); the medians are those that the method's authors' settings give."""
    normal = torch.linspace(-3, 3, 7, dtype=torch.float64)
    found = trigflow.angles_of(normal, 0.2, 1.6, 0.5)
    torch.testing.assert_close(torch.log(0.5 * torch.tan(found)), 0.2 + 1.6 * normal)
    assert trigflow.angles_of(torch.zeros(1), 0.2, 1.6, 0.5).item() == pytest.approx(1.18, abs=5e-3)
    assert trigflow.angles_of(torch.zeros(1), -0.6, 1.0, 0.5).item() == pytest.approx(
        0.83, abs=5e-3
    )


@pytest.fixture
def network(tiny_sana: Path) -> nn.Module:
    model: nn.Module = SanaTransformer2DModel.from_pretrained(tiny_sana / "transformer")
    return model.eval().requires_grad_(False)


def inputs_of(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(1)
    x, dx = torch.randn(2, 2, 4, 4, 4, dtype=torch.float64)
    states = torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {
        "x": x.to(dtype),
        "dx": dx.to(dtype),
        "t": torch.tensor([0.9, 1.3], dtype=dtype),
        "dt": torch.tensor([0.4, 0.2], dtype=dtype),
        "text": {"encoder_hidden_states": states.to(dtype), "encoder_attention_mask": mask},
    }


def flow_of(network: nn.Module, given: dict[str, Any]) -> trigflow.Flow:
    return lambda noisy, times: velocity(network, noisy, times, given["text"])


def derivative(network: nn.Module, given: dict[str, Any]) -> Tensor:
    parts = [given[name] for name in ("x", "t", "dx", "dt")]
    return trigflow.forward_derivative(flow_of(network, given), *parts)


@pytest.fixture
def doubled(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The network in float64 throughout: its own casts to float32 do nothing."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    return network.double()


def test_the_derivative_is_that_of_finite_differences(doubled: nn.Module) -> None:
    """In float64, where central differences leave eight digits."""
    given, step = inputs_of(torch.float64), 1e-5
    sides = [
        trigflow.predict(
            flow_of(doubled, given),
            given["x"] + sign * step * given["dx"],
            given["t"] + sign * step * given["dt"],
        )
        for sign in (1, -1)
    ]
    found = derivative(doubled, given)
    torch.testing.assert_close(found, (sides[0] - sides[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_the_derivative_is_that_of_functorch_in_float64(doubled: nn.Module) -> None:
    """Another implementation: torch.func with PyTorch's own attention in plain operations."""
    given = inputs_of(torch.float64)
    exact = derivative(doubled, given)
    with sdpa_kernel(SDPBackend.MATH):
        _, other = torch.func.jvp(
            lambda x, t: trigflow.predict(flow_of(doubled, given), x, t),
            (given["x"], given["t"]),
            (given["dx"], given["dt"]),
        )
    torch.testing.assert_close(exact, other, rtol=1e-10, atol=1e-12)


def test_the_derivative_in_single_precision(network: nn.Module) -> None:
    """What training uses, in float32 and in bfloat16, stays near the float64 one."""
    single = derivative(network, inputs_of())
    half_network = SanaTransformer2DModel.from_config(network.config)  # type: ignore[attr-defined]
    half_network.load_state_dict(network.state_dict())
    half_network = half_network.to(torch.bfloat16).eval()
    given = inputs_of()
    text = {
        k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in given["text"].items()
    }
    half = trigflow.forward_derivative(
        lambda noisy, times: velocity(half_network, noisy.to(torch.bfloat16), times, text),
        given["x"],
        given["t"],
        given["dx"],
        given["dt"],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda self: self)
        exact = derivative(network.double(), inputs_of(torch.float64))
    assert single.dtype == half.dtype == torch.float32
    assert (single - exact).norm() / exact.norm() < 1e-5
    assert (half - exact).norm() / exact.norm() < 0.1


def test_only_softmax_attention_is_written_out(network: nn.Module) -> None:
    """The linear attention of the blocks is untouched, so that the network is the same function."""
    given = inputs_of()
    flow = flow_of(network, given)
    plain = trigflow.predict(flow, given["x"], given["t"])
    with trigflow.explicit_attention():
        inside = trigflow.predict(flow, given["x"], given["t"])
    torch.testing.assert_close(inside, plain, rtol=1e-5, atol=1e-6)


def test_the_derivative_is_not_of_the_graph(network: nn.Module) -> None:
    """Nothing is recorded, whatever requires a gradient."""
    assert not derivative(network.requires_grad_(True), inputs_of()).requires_grad


def test_tangent_and_losses_are_the_formulas() -> None:
    """Written out sample by sample in float64."""
    random = np.random.default_rng(0)
    f, d, j, x, g_target = (random.normal(size=(3, 2, 2, 2)) for _ in range(5))
    t, logvar = np.array([0.3, 1.0, 1.5]), np.array([0.1, -0.4, 0.7])
    s, r = 0.5, 0.25
    rows, losses = [], []
    for k in range(3):
        g = -(math.cos(t[k]) ** 2) * (s * f[k] - d[k])
        g -= r * (math.cos(t[k]) * math.sin(t[k]) * x[k] + s * j[k])
        rows.append(g / (math.sqrt((g**2).sum()) + 0.1))
        weight = 1 / (math.tan(t[k]) * s)
        squares = (f[k] - g_target[k]) ** 2
        losses.append((weight * math.exp(-logvar[k]) * squares + logvar[k]).mean())
    tf, td, tj, tx, tt = (torch.from_numpy(each) for each in (f, d, j, x, t))
    found = trigflow.tangent(tf, td, tj, tx, tt, r, s)
    torch.testing.assert_close(found, torch.from_numpy(np.stack(rows)))
    loss = trigflow.consistency_loss(
        tf, torch.from_numpy(g_target), torch.from_numpy(logvar), tt, s
    )
    torch.testing.assert_close(loss, torch.tensor(losses, dtype=torch.float64))


def test_hinge_losses_are_the_formulas() -> None:
    """And more fakes weigh no more than one."""
    real = torch.tensor([[0.5, 2.0], [-1.0, 0.0]])
    fake = torch.tensor([[-2.0, 0.0], [1.0, 3.0]])
    other = torch.tensor([[0.0, 0.0], [-3.0, -3.0]])
    assert trigflow.generator_loss(fake).tolist() == [1.0, -2.0]
    # first sample: real (0.5 + 0) / 2, fake (0 + 1) / 2, other (1 + 1) / 2
    alone = trigflow.discriminator_loss(real, [fake])
    both = trigflow.discriminator_loss(real, [fake, other])
    assert alone.tolist() == [(0.25 + 0.5) / 2, (1.5 + 3.0) / 2]
    assert both.tolist() == [(0.25 + 0.75) / 2, (1.5 + 1.5) / 2]


def plain_head(head: Head, features: Tensor) -> Tensor:
    """A head by PyTorch's own layers, with the same weights and singular vectors."""

    def convolution(ours: Any, tokens: Tensor) -> Tensor:
        out, channels, width = ours.weight.shape
        layer = nn.Conv1d(channels, out, width, padding=width // 2, padding_mode="circular")
        layer.weight.data, layer.bias.data = ours.weight.data, ours.bias.data  # type: ignore[union-attr]
        normed: Any = nn.utils.spectral_norm(layer)
        normed.weight_u.copy_(ours.left)
        normed.weight_v.copy_(ours.right)
        result: Tensor = normed.eval()(tokens)
        return result

    def block(ours: Any, tokens: Tensor) -> Tensor:
        hidden = convolution(ours.convolution, tokens)
        weight, bias = ours.norm.weight.data, ours.norm.bias.data
        count = math.ceil(len(hidden) / 8)
        size = len(hidden) // count
        normed = [
            F.batch_norm(hidden[at : at + size], None, None, weight, bias, training=True)
            for at in range(0, len(hidden), size)
        ]
        return F.leaky_relu(torch.cat(normed), 0.2)

    tokens = block(head.first, features.transpose(1, 2))
    tokens = (block(head.second, tokens) + tokens) / math.sqrt(2)
    return convolution(head.last, tokens)[:, 0]


@pytest.mark.parametrize("count", [1, 6, 16])
def test_logits_are_those_of_stock_layers(count: int) -> None:
    """Spectral norm, circular convolution, norm in groups of eight, residual."""
    torch.manual_seed(0)
    heads = Heads(6, 2)
    for parameter in heads.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    features = [torch.randn(count, 16, 6) for _ in range(2)]
    expected = torch.cat(
        [plain_head(head, f) for head, f in zip(heads.heads, features, strict=True)],  # type: ignore[arg-type]
        1,
    )
    torch.testing.assert_close(heads(features), expected, rtol=1e-4, atol=1e-5)


def test_power_iteration_finds_the_largest_singular_value() -> None:
    """And only `iterate` moves the vectors, so that a pass leaves no trace."""
    torch.manual_seed(0)
    heads = Heads(6, 1)
    before = {name: each.clone() for name, each in heads.named_buffers()}
    heads([torch.randn(2, 16, 6)])
    assert all(torch.equal(before[name], each) for name, each in heads.named_buffers())
    for _ in range(500):
        heads.iterate()
    convolution: Any = heads.get_submodule("heads.0.second.convolution")
    flat = convolution.weight.flatten(1)
    found = convolution.left @ flat @ convolution.right
    torch.testing.assert_close(found, torch.linalg.matrix_norm(flat, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [9, 17])
def test_any_batch_is_taken(count: int) -> None:
    """Groups are as equal as they can be; and a row of fewer tokens than the kernel goes round."""
    assert Heads(4, 1)([torch.randn(count, 3, 4)]).shape == (count, 3)


@pytest.mark.parametrize("kind", ["none", "added", "bool", "causal", "scale"])
def test_attention_written_out_is_pytorch_s(kind: str) -> None:
    """In float64, against the stock kernel, for each of its arguments that a block may use."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, generator=generator) for n in (5, 7, 7))
    options: dict[str, Any] = {
        "none": {},
        "added": {"attn_mask": torch.randn(2, 1, 5, 7, dtype=torch.float64, generator=generator)},
        "bool": {"attn_mask": torch.arange(7)[None].expand(5, 7) < 4},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
    }[kind]
    found = trigflow._attention(q, k, v, **options)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found, trigflow._attention(q, k, v)) or kind == "none"
