"""RMS norm on CUDA: what PyTorch's kernel keeps and makes, by hand, in one layer and in models."""

from __future__ import annotations

import json
from importlib import import_module, resources
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

from compiler.plan import Layout
from runtime.memory import pretend
from runtime.memory.attention import workspace
from runtime.memory.norms import BLOCKS, partial_sums
from runtime.memory.pretend import as_on
from runtime.memory.rounding import rounded
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.tracker import Tracker
from runtime.offload import activations
from tests.runtime.memory_cases import candidate, known
from tests.runtime.test_memory_depth import check

HALF = torch.bfloat16


def test_pytorch_says_what_it_keeps() -> None:
    """Its own tables: CUDA has a kernel, and the derivative wants its input, the second result and
    the weight."""
    tables = resources.files("torchgen") / "packaged"
    native = (tables / "ATen" / "native" / "native_functions.yaml").read_text(encoding="utf-8")
    row = native.split("- func: _fused_rms_norm(")[1].split("- func:")[0]
    assert "CUDA: _fused_rms_norm_cuda" in row
    derivatives = (tables / "autograd" / "derivatives.yaml").read_text(encoding="utf-8")
    row = derivatives.split("- name: _fused_rms_norm(")[1].split("- name:")[0]
    call = "_fused_rms_norm_backward(grads[0], input, normalized_shape, result1, weight"
    assert call in row


def ran(given: Tensor, weight: Tensor | None, device: str = "cuda") -> list[int]:
    """Bytes: the forward pass's peak, what it leaves, the backward pass's peak, what it leaves."""
    found = []
    with as_on(device), Tracker({"meta"}) as tracker:
        tracker.register([t for t in (given, weight) if t is not None], "given")
        start = tracker.current
        size = given.shape[-1]
        out = functional.rms_norm(given, (size,), weight, 1e-6)
        assert out.shape == given.shape and out.dtype == given.dtype
        found += [tracker.peak - start, tracker.current - start]
        if out.requires_grad:
            gradient = torch.empty_like(out)
            tracker.reset_peak()
            out.backward(gradient)
            found += [tracker.peak - start, tracker.current - start]
    return found


def rows(*shape: int, dtype: torch.dtype = HALF, grad: bool = True) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


@pytest.mark.parametrize(
    ("dtype", "number"), [(HALF, 4), (torch.float16, 4), (torch.float32, 4), (torch.float64, 8)]
)
def test_a_norm_keeps_its_input_and_a_number_a_row(dtype: torch.dtype, number: int) -> None:
    """The input is there already. In the backward pass: its gradient and the result's."""
    count, size = 2 * 256 * 4, 64
    whole, scale = count * size * dtype.itemsize, count * number
    found = ran(rows(2, 256, 4, size, dtype=dtype), rows(size, dtype=dtype, grad=False))
    assert found == [whole + scale, whole + scale, 3 * whole + scale, 3 * whole]
    assert ran(rows(2, 256, 4, size, dtype=dtype), None) == found


def test_a_norm_without_gradients_keeps_nothing() -> None:
    whole, scale = 2 * 2048 * 64, 4 * 2048
    assert ran(rows(2048, 64, grad=False), rows(64, grad=False)) == [whole + scale, whole]


def test_an_input_that_lies_otherwise_is_copied_for_a_while() -> None:
    """As a third of a projection does: what is kept is the projection, not the copy."""
    whole, scale = 2 * 2048 * 64, 4 * 2048
    third, weight = rows(2048, 3 * 64)[:, 64:128], rows(64, grad=False)
    assert ran(third, weight)[:2] == [2 * whole + scale, whole + scale]
    with as_on("cuda"), Tracker({"meta"}) as tracker:
        out = functional.rms_norm(third, (64,), weight)
        gradient = torch.empty_like(out)
        tracker.reset_peak()
        found = torch.autograd.grad(out, third, gradient)
    assert tracker.peak == 2 * whole + scale + 2 * whole  # once more a copy, and the gradient
    assert found[0].is_contiguous()


def test_a_gradient_that_lies_otherwise_is_copied() -> None:
    whole, scale = 2 * 2048 * 64, 4 * 2048
    given, weight = rows(2048, 64), rows(64, grad=False)
    with as_on("cuda"), Tracker({"meta"}) as tracker:
        out = functional.rms_norm(given, (64,), weight)
        gradient = torch.empty(64, 2048, dtype=HALF, device="meta").t()
        tracker.reset_peak()
        out.backward(gradient)
    assert tracker.peak == 4 * whole + scale


@pytest.mark.parametrize(
    ("count", "size", "parts"),
    [
        (64 * 1024, 128, 0),  # not many rows
        (64 * 1024 + 1, 128, 64 * 1024 // 32 + 1),
        (4608 * 24, 128, 4608 * 24 // 32),
        (2**20, 128, BLOCKS // 4),  # as many blocks as there may be
        (2**20, 3072, 0),  # long rows
    ],
)
def test_a_weight_s_gradient_is_summed_in_parts(count: int, size: int, parts: int) -> None:
    """Of many short rows: the parts live beside all else that the kernel makes."""
    assert partial_sums(count, size) == parts
    whole, scale = rounded(2 * count * size), rounded(4 * count)
    found = ran(rows(count, size), rows(size))
    weight = rounded(2 * size)
    more = rounded(2 * parts * size) + weight if parts else 0  # the parts and their sum
    assert found[2] == 3 * whole + scale + weight + more
    assert found[3] == 3 * whole + weight


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        (rows(2048, 64), rows(64, dtype=torch.float32, grad=False)),
        (rows(2048, 64, dtype=torch.float32), rows(64, grad=False)),
        (rows(2, 8, 32, 64).to(memory_format=torch.channels_last), rows(64, grad=False)),
        (rows(2048, 64, dtype=torch.complex64), None),
    ],
)
def test_without_a_kernel_it_is_what_it_is_elsewhere(given: Tensor, weight: Tensor | None) -> None:
    """`rms_norm_symint` in layer_norm.cpp."""
    assert ran(given, weight) == ran(given, weight, "cpu")


def test_other_devices_have_pytorch_s_own() -> None:
    stock = functional.rms_norm
    for device in ("cpu", "mps"):
        with as_on(device):
            assert functional.rms_norm is stock
    with as_on("cuda"):
        assert functional.rms_norm is not stock
        norm = nn.RMSNorm(4)  # with values: PyTorch's own
        assert torch.equal(norm(torch.ones(2, 4)), stock(torch.ones(2, 4), (4,), norm.weight))
    assert functional.rms_norm is stock


def test_a_block_of_flux_by_hand() -> None:
    """What a single block keeps for its backward pass where nothing in it is trained, in units of
    its input."""
    batch, text, image, heads, size = 2, 64, 192, 2, 64
    tokens, width = text + image, heads * size
    block = FluxSingleTransformerBlock(width, heads, size).to(HALF).to("meta").requires_grad_(False)
    given = rows(batch, image, width)
    rest = rows(batch, text, width, grad=False), rows(batch, width, grad=False)
    rope = [torch.empty(tokens, size, device="meta") for _ in range(2)]
    with as_on("cuda"), Tracker({"meta"}, workspaces=workspace("cuda")) as tracker:
        tracker.register([*block.parameters(), given, *rest, *rope], "given")
        out = block(given, *rest, rope)
    whole = 2 * batch * tokens * width
    kept = {
        "tokens of both kinds": whole,
        "modulation: all three, and 1 + scale": 2 * batch * 4 * width,
        "mean and deviation of the layer norm": 2 * 4 * batch * tokens,
        "in the activation function": 4 * whole,
        "queries and keys before their norm, values": 3 * whole,
        "a number a row of each norm": 2 * 4 * batch * tokens * heads,
        "turned queries and keys": 2 * whole,
        "attention: its result, a number a row, two of its random numbers": whole
        + 4 * batch * heads * tokens
        + 2 * 512,
        "the result": whole,
    }
    assert tracker.categories()["activations"] == sum(kept.values())
    assert out[0].shape == (batch, text, width)


@pytest.mark.parametrize(
    ("base", "less"),
    [
        # Queries and keys of 19 + 38 blocks: themselves in place of copies in float32.
        ("black-forest-labs/FLUX.1-dev", (19 + 38) * 2),
        # Of 20 of its 25 blocks they are parts of a projection, kept for the values anyway.
        ("black-forest-labs/FLUX.2-klein-base-4B", 5 * 2 + 20 * 2 * 2),
    ],
)
def test_what_published_models_keep(base: str, less: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the forward pass, against PyTorch's own function without the kernel: so many times all
    queries of a block (4096 tokens of a picture and 512 of a prompt, 3072 wide)."""
    step = candidate(known(base), rank=16)

    def kept() -> int:
        return int(RuntimeMemoryModel().course(step, step.shapes[0]).window[1].live[-1].sum())

    found = kept()
    monkeypatch.setattr(pretend, "norm_for", lambda stock: stock)
    assert kept() - found == less * 2 * (4096 + 512) * 3072


@pytest.mark.parametrize("family", ["flux", "flux2"])
def test_it_may_wait_on_the_host_and_be_recomputed(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "SMALLEST", 2**14)
    tiny = import_module(f"tests.runtime.tinies.{family}")
    shape = {**tiny.SMALL, "num_layers": 11, "num_single_layers": 14}
    layout = Layout(offload_activations=True, activation_checkpointing=2)
    given: dict[str, Any] = {"tokens": 32, "shapes": ((256, 256, 2),), "rank": 4}
    step = candidate(known(tiny.BASE, tiny.PARTS, **shape), layout=layout, **given)
    assert json.loads(step.model.configs["transformer"])["num_layers"] == 11
    check(step)
