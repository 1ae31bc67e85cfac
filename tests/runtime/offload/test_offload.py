"""Weights and activations that wait on the host: the same bits, less memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compiler.families import FAMILIES
from compiler.passes.ladder import waiting
from compiler.plan import Adapter, Layout, Precision
from runtime.build import build, state
from runtime.families import family_of
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.step import run_step
from runtime.memory.tracker import Tracker
from runtime.offload import activations
from runtime.offload.blocks import chosen, spacing
from runtime.offload.host import packed
from runtime.optimizers import make_optimizer
from runtime.step import gradient_norm, micro_step, update
from tests.runtime.memory_cases import small
from tests.runtime.replay import OBJECTIVE
from tests.runtime.tiny import tiny_model

CPU = torch.device("cpu")
TARGETS = {"sana": (r".*attn\d\.to_[qkv]",), "sd3": (r".*attn\.to_[qkv]", r".*add_[qkv]_proj")}
LAYOUTS = [
    Layout(offload_blocks=1),
    Layout(offload_blocks=2),
    Layout(offload_blocks=99),
    Layout(offload_blocks=99, activation_checkpointing=1),
    Layout(offload_blocks=2, activation_checkpointing=2),
    Layout(offload_activations=True),
    Layout(offload_activations=True, activation_checkpointing=1),
    Layout(offload_activations=True, offload_blocks=99, activation_checkpointing=2),
]


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SMALLEST", 0)


@pytest.fixture(params=["sana", "sd3"])
def base(request: Any, tiny_sana: Path, tiny_sd3: Path) -> tuple[str, Path]:
    return request.param, {"sana": tiny_sana, "sd3": tiny_sd3}[request.param]


def trained(base: tuple[str, Path], layout: Layout, dtype: Any, rank: int = 4) -> Iterator[Tensor]:
    """Losses, norms and weights of three steps."""
    name, folder = base
    family, model = family_of(name), tiny_model(name, folder)
    adapter = Adapter(
        kind="lora", rank=rank, alpha=4, dropout=0.1, init="gaussian", targets=TARGETS[name]
    )
    precision = Precision(compute=dtype, weights=dtype, trained="float32", cache="float32")
    built = build(
        model, adapter if rank else None, precision, layout, family, CPU, empty=False, seed=0
    )
    optimizer = make_optimizer(small(name).optimizer, built.trainable.items(), CPU)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        batch = family.example_batch(model, 64, 96, 2, small(name).text, CPU)
        for tensor in (batch.latents, batch.noise, *batch.text.values()):
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
        torch.manual_seed(step)
        yield micro_step(family, built.model, batch, OBJECTIVE, precision, 2)
        norm = gradient_norm(built.trainable.values())
        yield norm
        update(optimizer, norm, 1.0)
    yield from state(built).values()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_adapter_trains_the_same_bits(base: Any, layout: Layout, dtype: str) -> None:
    plain = list(trained(base, Layout(), dtype))
    moved = list(trained(base, layout, dtype))
    assert len(plain) == len(moved) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


def test_full_training_with_activations_on_the_host(base: Any) -> None:
    plain = list(trained(base, Layout(), "float32", rank=0))
    moved = list(trained(base, Layout(offload_activations=True), "float32", rank=0))
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


def test_trained_blocks_cannot_wait(base: Any) -> None:
    with pytest.raises(ValueError, match="train an adapter"):
        next(trained(base, Layout(offload_blocks=1), "float32", rank=0))


@pytest.mark.parametrize("family", ["sana", "sd3"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_simulated_is_measured(family: str, layout: Layout) -> None:
    step = small(family, rank=4, compute="bfloat16", layout=layout, pictures=((128, 128),))
    model = RuntimeMemoryModel()
    measured = run_step(step, step.shapes[0], CPU, Tracker({"cpu"}))
    simulated = model.course(step, step.shapes[0])
    for phase in ("load", "train_peak", "update_peak", "save", "validate_peak"):
        assert getattr(simulated, phase) == getattr(measured, phase), phase


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_what_waits_is_not_on_the_device(family: str) -> None:
    model = RuntimeMemoryModel()

    def found(layout: Layout) -> dict[str, int]:
        step = small(family, rank=4, layout=layout)
        return dict(model.course(step, step.shapes[0]).train_peak)

    plain, blocks = found(Layout()), found(Layout(offload_blocks=99))
    assert blocks["weights"] < 0.75 * plain["weights"]  # two of three or four blocks, and the ends
    kept = found(Layout(offload_activations=True))
    assert sum(kept.values()) < 0.8 * sum(plain.values())
    assert kept["weights"] == plain["weights"]


def test_blocks_are_spread_evenly() -> None:
    assert chosen(38, 1) == [19]
    assert chosen(4, 2) == [1, 3]
    assert chosen(5, 9) == [0, 1, 2, 3, 4]
    for count in (1, 7, 38, 57):
        for offloaded in range(1, count + 1):
            numbers = chosen(count, offloaded)
            assert len(set(numbers)) == offloaded and numbers == sorted(numbers)
            assert numbers[0] >= 0 and numbers[-1] < count
            gaps = [b - a for a, b in pairwise(numbers)]
            assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("family", ["sana", "sd3", "qwen_image", "sdxl"])
def test_the_ladder_s_blocks_repeat_themselves(family: str) -> None:
    """So that few blocks tell of all; but for three quarters of a UNet's."""
    card = FAMILIES[family]
    for known in card.known:
        config = known.configs[card.trained_component]
        apart = [spacing(card.depth(config), count) for count in waiting(card, config)]
        assert apart == ([4, 3, 2, 0, 1] if family == "sdxl" else [4, 3, 2, 1])


def test_a_new_tensor_at_an_old_address_is_another_one() -> None:
    """Freed memory is used again at once; what was saved of it must not be taken for the new."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    other = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    other.load_state_dict(model.state_dict())
    activations.offload_activations(other)
    given = torch.randn(32, 64)
    for each in (model, other):
        each(given).relu().square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


@given(st.lists(st.integers(1, 10**6), max_size=30))
def test_waiting_weights_share_pieces(sizes: list[int]) -> None:
    """Pieces are powers of two, nothing overlaps, and little is wasted."""
    places, pieces = packed(sizes)
    assert all(size & (size - 1) == 0 for size in pieces)
    for piece, whole in enumerate(pieces):
        inside = sorted(
            (at, size) for (n, at), size in zip(places, sizes, strict=True) if n == piece
        )
        ends = [at + size for at, size in inside]
        assert all(end <= at for end, (at, _) in zip(ends, inside[1:], strict=False))
        assert inside and ends[-1] <= whole and all(at % 512 == 0 for at, _ in inside)
    assert sum(pieces) <= 2 * sum(512 * -(-size // 512) for size in sizes)


def test_weights_of_a_large_model_s_block() -> None:
    """A block of Stable Diffusion 3.5 Large: 406 MiB, of which pinned alone 26 % would be lost."""
    width, half = 2432, 2
    sizes = [width * width * half] * 8 + [4 * width * width * half] * 4
    sizes += [6 * width * width * half] * 2 + [width * half] * 20
    alone = sum(1 << (size - 1).bit_length() for size in sizes)
    assert alone > 1.2 * sum(sizes) > sum(packed(sizes)[1]) * 1.1


class TestStreams:
    """What computes waits for copies, and for no more of them than are under way."""

    @pytest.fixture
    def log(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Streams and events that only tell what they are asked; tensors stay on the processor."""
        log: list[str] = []

        class Stream:
            def wait_stream(self, _: Any) -> None:
                log.append("copy after computing")

            def record_event(self) -> int:
                copies.append(len(copies))
                return copies[-1]

            def wait_event(self, event: int) -> None:
                log.append(f"compute after copy {event}")

        copies: list[int] = []
        stream = Stream()
        monkeypatch.setattr(activations.Saved, "_stream", lambda *_: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        return log

    def test_no_more_leave_at_once(self, log: list[str]) -> None:
        saved = activations.Saved(set())
        given = [torch.randn(8) for _ in range(5)]
        parked = [saved.pack(tensor) for tensor in given]
        waits = [line for line in log if line.startswith("compute")]
        assert waits == [f"compute after copy {n}" for n in range(3)]  # the last two are under way
        assert len(saved._leaving) == activations.BEHIND
        back = [saved.unpack(one) for one in reversed(parked)]
        assert all(torch.equal(a, b) for a, b in zip(back, reversed(given), strict=True))
        asked = [line for line in log if line.startswith("compute")][3:]
        assert asked[:2] == ["compute after copy 3", "compute after copy 4"]  # all have left
        assert asked[2:] == [f"compute after copy {5 + n}" for n in range(5)]  # and come back

    def test_what_is_sent_for_in_vain_is_waited_for(self, log: list[str]) -> None:
        saved = activations.Saved(set())
        kept = [torch.randn(8) for _ in range(3)]
        parked = [saved.pack(tensor) for tensor in kept]
        saved.unpack(parked[2])
        log.clear()
        saved.__del__()
        assert log == ["compute after copy 4", "compute after copy 5"]
