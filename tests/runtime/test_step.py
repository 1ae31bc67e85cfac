"""The step: accumulation, number formats, clipping; and activation checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attrs import evolve
from torch import Tensor, nn

from compiler.plan import Adapter, Layout, Precision, Text
from runtime.batch import Batch
from runtime.build import Built, build, state
from runtime.families import family_of
from runtime.families.base import Family
from runtime.objective import add_noise, per_sample_loss
from runtime.step import gradient_norm, micro_step, update
from tests.runtime.replay import FP32, OBJECTIVE
from tests.runtime.tiny import tiny_model

CPU = torch.device("cpu")
MIXED = Precision(compute="bfloat16", weights="bfloat16", trained="float32", cache="float32")
BF16 = evolve(MIXED, trained="bfloat16")
LORA = Adapter(
    kind="lora",
    rank=4,
    alpha=8.0,
    dropout=0.0,
    init="gaussian",
    targets=(r"transformer_blocks\.\d+\..*to_[qkv]",),
)


@pytest.fixture(params=["sana", "sd3"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


def made(
    folder: Path,
    adapter: Adapter | None,
    precision: Precision = FP32,
    every: int = 0,
    seed: int = 0,
) -> tuple[Family, Built]:
    family = family_of(folder.name)
    model = tiny_model(folder.name, folder)
    return family, build(
        model,
        adapter,
        precision,
        Layout(activation_checkpointing=every),
        family,
        CPU,
        empty=False,
        seed=seed,
    )


def batch(name: str, size: int, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    text: dict[str, Tensor]
    if name == "sana":
        text = {
            "encoder_hidden_states": torch.randn(size, 5, 16),
            "encoder_attention_mask": torch.ones(size, 5, dtype=torch.int64),
        }
    else:
        text = {
            "encoder_hidden_states": torch.randn(size, 9, 48),
            "pooled_projections": torch.randn(size, 40),
        }
    return Batch(
        latents=torch.randn(size, 4, 8, 8),
        noise=torch.randn(size, 4, 8, 8),
        sigmas=torch.rand(size),
        text=text,
    )


def part(whole: Batch, start: int, stop: int) -> Batch:
    return Batch(
        latents=whole.latents[start:stop],
        noise=whole.noise[start:stop],
        sigmas=whole.sigmas[start:stop],
        text={k: v[start:stop] for k, v in whole.text.items()},
    )


def gradients(built: Built) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in built.trainable.items() if p.grad is not None}


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_window_of_uneven_batches_equals_one_large_batch(
    folder: Path, adapter: Adapter | None
) -> None:
    family, built = made(folder, adapter)
    whole = batch(folder.name, 5)
    losses = micro_step(family, built.model, whole, OBJECTIVE, FP32, 5)
    expected = gradients(built)
    for p in built.trainable.values():
        p.grad = None
    parts = [part(whole, 0, 2), part(whole, 2, 4), part(whole, 4, 5)]
    found = [micro_step(family, built.model, b, OBJECTIVE, FP32, 5) for b in parts]
    torch.testing.assert_close(torch.cat(found), losses, rtol=1e-5, atol=1e-6)
    assert not losses.requires_grad
    for name, gradient in gradients(built).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_gradients_are_those_of_the_mean_loss(folder: Path) -> None:
    """Against autograd on the plain expression, without our step."""
    family, built = made(folder, LORA)
    b = batch(folder.name, 3)
    micro_step(family, built.model, b, OBJECTIVE, FP32, 3)
    found = gradients(built)
    prediction = family.predict(
        built.model, add_noise(b.latents, b.noise, b.sigmas), b.sigmas, b.text
    )
    loss = ((prediction - (b.noise - b.latents)) ** 2).mean()
    expected = torch.autograd.grad(loss, list(built.trainable.values()))
    for gradient, (name, _) in zip(expected, built.trainable.items(), strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_clipping_is_by_the_global_norm() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((2,), -1.0)
    norm = gradient_norm(parameters)
    assert norm.item() == pytest.approx(14**0.5)
    update(optimizer, norm, 1.0)
    moved = torch.cat([p.detach() for p in parameters])
    assert moved.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert all(p.grad is None for p in parameters)


def test_zero_means_no_clipping() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 100.0)
    update(torch.optim.SGD([parameter], lr=1.0), gradient_norm([parameter]), 0.0)
    assert torch.equal(parameter.detach(), torch.full((4,), -100.0))


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("adapter", [None, evolve(LORA, dropout=0.3)], ids=["full", "lora"])
@pytest.mark.parametrize("precision", [FP32, MIXED], ids=["fp32", "mixed"])
def test_checkpointing_changes_no_bit(
    folder: Path, adapter: Adapter | None, every: int, precision: Precision
) -> None:
    results = []
    for interval in (0, every):
        family, built = made(folder, adapter, precision, interval)
        torch.manual_seed(3)  # dropout
        losses = micro_step(family, built.model, batch(folder.name, 2), OBJECTIVE, precision, 2)
        results.append((losses, gradients(built)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(g, results[1][1][n]) for n, g in results[0][1].items())


@pytest.mark.parametrize(("every", "recomputed"), [(0, 0), (1, 3), (2, 2), (3, 1), (9, 1)])
def test_every_nth_block_is_recomputed(folder: Path, every: int, recomputed: int) -> None:
    """Of three blocks; a recomputed one runs twice."""
    family, built = made(folder, LORA, every=every)
    runs: list[nn.Module] = []
    blocks: nn.ModuleList = built.model.transformer_blocks  # type: ignore[assignment]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, inputs: runs.append(module))
    micro_step(family, built.model, batch(folder.name, 1), OBJECTIVE, FP32, 1)
    assert len(runs) == 3 + recomputed


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["plain", "foreach", "fused"])
def test_masters_keep_what_bfloat16_would_lose(
    folder: Path, adapter: Adapter | None, kind: str
) -> None:
    family, built = made(folder, adapter, MIXED)
    assert all(p.dtype == torch.bfloat16 for p in built.model.parameters())
    assert all(p.dtype == torch.float32 for p in built.trainable.values())
    options = {} if kind == "plain" else {kind: True}
    optimizer = torch.optim.AdamW(built.trainable.values(), lr=1e-5, **options)  # type: ignore[arg-type]
    before = {n: p.clone() for n, p in state(built).items()}
    for step in range(2):
        micro_step(family, built.model, batch(folder.name, 2, step), OBJECTIVE, MIXED, 2)
        assert all(p.grad is None for p in built.model.parameters())
        update(optimizer, gradient_norm(built.trainable.values()), 1.0)
    changed = torch.cat([(p != before[n]).flatten() for n, p in state(built).items()])
    assert changed.double().mean() > 0.9  # bfloat16 weights of this size would not move at all
    copies = dict(built.model.named_parameters())
    b = batch(folder.name, 1)
    with torch.no_grad():  # a forward pass sees the masters' newest values
        half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in b.text.items()}
        family.predict(built.model, b.latents.bfloat16(), b.sigmas, half)
    for name, master in built.trainable.items():
        assert torch.equal(copies[name], master.bfloat16())


def test_mixed_gradients_add_up_in_float32(folder: Path) -> None:
    """Many small micro-batches: a bfloat16 sum would stall."""
    family, built = made(folder, LORA, MIXED)
    b = batch(folder.name, 1)
    micro_step(family, built.model, b, OBJECTIVE, MIXED, 1)
    once = gradients(built)
    for _ in range(63):
        micro_step(family, built.model, b, OBJECTIVE, MIXED, 1)
    for name, gradient in gradients(built).items():
        torch.testing.assert_close(gradient, 64 * once[name], rtol=1e-5, atol=0)


def test_mixed_losses_are_near_those_in_float32(folder: Path) -> None:
    losses = []
    for precision in (FP32, MIXED, BF16):
        family, built = made(folder, LORA, precision)
        losses.append(
            micro_step(family, built.model, batch(folder.name, 4), OBJECTIVE, precision, 4)
        )
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    assert torch.equal(losses[1], losses[2])  # adapters start with B = 0


@pytest.mark.parametrize(("adapter", "precision"), [(None, FP32), (LORA, MIXED)])
def test_the_step_runs_on_meta_tensors(
    folder: Path, adapter: Adapter | None, precision: Precision
) -> None:
    family, model = family_of(folder.name), tiny_model(folder.name, folder)
    meta = torch.device("meta")
    built = build(
        model,
        adapter,
        precision,
        Layout(activation_checkpointing=2),
        family,
        meta,
        empty=True,
        seed=0,
    )
    optimizer = torch.optim.AdamW(built.trainable.values())
    example = family.example_batch(model, 64, 64, 2, Text(max_length=32, instruction=()), meta)
    for _ in range(2):
        losses = micro_step(family, built.model, example, OBJECTIVE, precision, 2)
        update(optimizer, gradient_norm(built.trainable.values()), 1.0)
    assert losses.is_meta and losses.shape == (2,)


def test_per_sample_losses_are_what_the_step_returns(folder: Path) -> None:
    family, built = made(folder, None)
    b = batch(folder.name, 2)
    with torch.no_grad():
        noisy = add_noise(b.latents, b.noise, b.sigmas)
        expected = per_sample_loss(
            family.predict(built.model, noisy, b.sigmas, b.text), b, OBJECTIVE
        )
    found = micro_step(family, built.model, b, OBJECTIVE, FP32, 7)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
