"""Compiled blocks and kernels of attention: the same numbers within rounding, as few graphs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from compiler.attention import KERNELS
from compiler.plan import Adapter, Bucket, Layout, Speed
from compiler.shapes import pass_shapes
from runtime import checkpoints
from runtime import speed as speed_module
from runtime.build import Built, build
from runtime.errors import MachineUnfit, RunFailed
from runtime.events import Silent
from runtime.execute import execute
from runtime.families import family_of
from runtime.families.base import Family
from runtime.machine import compiler
from runtime.memory.attention import attention_for
from runtime.speed import check_speed, prepare
from runtime.step import forward_losses, gradient_norm, micro_step, update
from tests.runtime.memory_cases import small
from tests.runtime.plans import PICTURES, draw_data, tiny_plan
from tests.runtime.replay import FP32, OBJECTIVE
from tests.runtime.test_memory_exact import MODEL, check
from tests.runtime.test_step import LORA, MIXED, batch, state
from tests.runtime.tiny import make_tiny, tiny_model

CPU = torch.device("cpu")
HALF = evolve(MIXED, compute="float16", weights="float16")
REGIONAL = Speed(compile="regional")
BLOCKS = Layout(activation_checkpointing=2, offload_blocks=2)
CONFIG: Any = torch._dynamo.config  # type: ignore[attr-defined]
KINDS = {"sana": 2, "sd3": 3}  # of blocks, for the compiler: first, middle, last
FEWEST = {"sana": 1, "sd3": 2}  # blocks in which nothing is left out but what is like the others


@pytest.fixture(params=["sana", "sd3"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing is compiled yet."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made as ever and run as they are, without writing kernels, which takes long."""
    monkeypatch.setattr(speed_module, "BACKEND", "aot_eager")


@pytest.fixture
def counted(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made and nothing is done with them."""
    monkeypatch.setattr(speed_module, "BACKEND", "eager")


def made(
    folder: Path, adapter: Adapter | None = None, speed: Speed | None = None, **rest: Any
) -> tuple[Family, Built]:
    family = family_of(folder.name)
    layout = rest.pop("layout", Layout())
    model = tiny_model(folder.name, folder)
    quantize = rest.pop("quantize", "none")
    parts = [evolve(c, quantize=quantize) if c.trained else c for c in model.components]
    return family, build(
        evolve(model, components=tuple(parts)),
        adapter,
        rest.pop("precision", FP32),
        layout,
        family,
        CPU,
        empty=False,
        seed=0,
        speed=speed or Speed(),
    )


def train(
    family: Family, built: Built, sizes: tuple[int, ...], precision: Any = FP32, seed: int = 0
) -> Tensor:
    """Losses of one step for each of the batch sizes; the weights move.

    The ranks of DyLoRA are drawn by `seed`.
    """
    optimizer = torch.optim.SGD(built.trainable.values(), lr=0.01)
    losses = []
    for step, size in enumerate(sizes):
        example = batch(family.card.name, size, step)
        for nested in built.nested:
            nested.begin(seed, step)
        losses.append(micro_step(family, built.model, example, OBJECTIVE, precision, size))
        update(optimizer, gradient_norm(built.trainable.values()), 1.0)
    return torch.cat(losses)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def alike(one: Built, other: Built, start: dict[str, Tensor], tolerance: float) -> None:
    """Both moved by the same from `start`, within `tolerance` of the whole movement."""
    moved = torch.cat([(p - start[n]).flatten() for n, p in state(one).items()])
    apart = torch.cat([(p - state(other)[n]).flatten() for n, p in state(one).items()])
    assert moved.norm() > 0
    assert apart.norm() <= tolerance * moved.norm()


@pytest.mark.slow
@pytest.mark.skipif(not compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("base", ["sana", "sd3"])
def test_three_compiled_steps_equal_plain_ones(base: str, tmp_path: Path, fresh: None) -> None:
    """With kernels written and all, of two shapes."""
    folder = make_tiny(base, tmp_path / base, num_layers=FEWEST[base])
    family, plain = made(folder, LORA)
    _, quick = made(folder, LORA, REGIONAL)
    start = {n: p.clone() for n, p in state(plain).items()}
    sizes = (2, 1, 2)
    expected = train(family, plain, sizes)
    assert graphs() == 0
    torch.testing.assert_close(train(family, quick, sizes), expected, rtol=1e-5, atol=1e-6)
    assert graphs() == 2 * FEWEST[base]
    alike(plain, quick, start, 1e-4)


def test_there_is_one_graph_for_each_shape_and_kind_of_block(folder: Path, counted: None) -> None:
    """Drawing and evaluation add none, and names stay."""
    family, built = made(folder, LORA, REGIONAL, layout=Layout(activation_checkpointing=1))
    _, plain = made(folder, LORA)
    train(family, built, (2,))
    assert graphs() == KINDS[folder.name]
    train(family, built, (1, 2, 1))
    assert graphs() == 2 * KINDS[folder.name]
    with torch.no_grad():
        forward_losses(family, built.model, batch(folder.name, 3), OBJECTIVE, FP32)
    assert graphs() == 2 * KINDS[folder.name]
    assert built.model.state_dict().keys() == plain.model.state_dict().keys()
    assert not any("_orig_mod" in name for name in built.model.state_dict())


@pytest.mark.parametrize(
    ("base", "how"),
    [
        ("sd3", {"precision": HALF}),
        ("sana", {"layout": BLOCKS}),
        ("sana", {"layout": Layout(offload_activations=True)}),
        ("sana", {"quantize": "int8"}),
        pytest.param("sd3", {"precision": MIXED}, marks=pytest.mark.slow),
        pytest.param("sana", {"quantize": "nf4"}, marks=pytest.mark.slow),
    ],
    ids=["half", "blocks", "activations", "int8", "mixed", "nf4"],
)
def test_it_goes_with(
    base: str,
    how: dict[str, Any],
    traced: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    depth = 3 if how.get("layout") == BLOCKS else FEWEST[base]
    folder = make_tiny(base, tmp_path / base, num_layers=depth)
    monkeypatch.setattr("runtime.offload.activations.SMALLEST", 64)
    family, plain = made(folder, LORA, **how)
    _, quick = made(folder, LORA, REGIONAL, **how)
    start = {n: p.clone() for n, p in state(plain).items()}
    precision = how.get("precision", FP32)
    expected = train(family, plain, (2, 2), precision)
    found = train(family, quick, (2, 2), precision)
    assert graphs() > 0
    exact = precision is FP32
    torch.testing.assert_close(found, expected, rtol=1e-5 if exact else 1e-2, atol=0)
    alike(plain, quick, start, 1e-4 if exact else 0.1)


def test_padded_prompts_change_nothing_but_the_number_of_shapes(
    tiny_sana: Path, counted: None
) -> None:
    family, built = made(tiny_sana, LORA, evolve(REGIONAL, tokens=12))
    _, plain = made(tiny_sana, LORA)
    for length in (5, 3, 7):
        whole = batch("sana", 2)
        text = {
            "encoder_hidden_states": torch.randn(2, length, 16),
            "encoder_attention_mask": torch.ones(2, length, dtype=torch.int64),
        }
        text["encoder_attention_mask"][0, -1] = 0
        given = evolve(whole, text=text)
        found = micro_step(family, built.model, given, OBJECTIVE, FP32, 2)
        expected = micro_step(family, plain.model, given, OBJECTIVE, FP32, 2)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert graphs() == KINDS["sana"]


def test_more_shapes_than_the_limit_are_an_error(tiny_sd3: Path, counted: None) -> None:
    """And not a run that is slower than it would be uncompiled."""
    family, built = made(tiny_sd3, LORA, REGIONAL)
    with CONFIG.patch(recompile_limit=3):
        train(family, built, (1,))
        with pytest.raises(RunFailed, match="can't be compiled") as caught:
            train(family, built, (2,))
    assert "speed.compile=off" in caught.value.help


def test_shapes_are_those_that_batches_have(tmp_path: Path, tiny_sd3: Path) -> None:
    plan = tiny_plan("sd3", tiny_sd3, draw_data(tmp_path / "data"), tmp_path / "run")[0]
    bucket = Bucket(source="s", width=64, height=96, images=7, samples=7, batch_size=3, batches=3)
    few = evolve(bucket, width=96, samples=2, batches=1)
    plan = evolve(plan, buckets=(bucket, few))
    assert pass_shapes(plan.buckets) == {(64, 96, 3), (64, 96, 1), (96, 96, 2)}
    parted = evolve(plan, steps=evolve(plan.steps, micro_batch=2))
    assert pass_shapes(parted.buckets, 2) == {(64, 96, 2), (64, 96, 1), (96, 96, 2)}
    with CONFIG.patch(recompile_limit=1, accumulated_recompile_limit=1):
        prepare(plan)
        assert CONFIG.recompile_limit == 1
        prepare(evolve(plan, speed=REGIONAL))
        assert CONFIG.recompile_limit == CONFIG.accumulated_recompile_limit == 3 * 3


@pytest.mark.parametrize("on", [True, False])
def test_tf32_is_on_or_off_by_all_its_names(
    tmp_path: Path, tiny_sd3: Path, on: bool, request: pytest.FixtureRequest
) -> None:
    """Convolutions too, for which PyTorch has it on by default."""
    plan = tiny_plan("sd3", tiny_sd3, draw_data(tmp_path / "data"), tmp_path / "run")[0]
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    for owner in (matmul, cudnn):
        request.addfinalizer(partial(setattr, owner, "allow_tf32", owner.allow_tf32))
    prepare(evolve(plan, device="cuda", speed=Speed(tf32=on)))
    assert matmul.allow_tf32 is cudnn.allow_tf32 is on
    assert torch.get_float32_matmul_precision() == ("high" if on else "highest")
    prepare(evolve(plan, device="cpu", speed=Speed(tf32=not on)))
    assert matmul.allow_tf32 is on


class Called(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("every", [0, 1])
def test_another_kernel_is_used_and_gives_the_same(folder: Path, every: int) -> None:
    layout = Layout(activation_checkpointing=every)
    family, plain = made(folder, LORA, layout=layout)
    _, other = made(folder, LORA, Speed(attention="native-math"), layout=layout)
    start = {n: p.clone() for n, p in state(plain).items()}
    fast = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    with Called() as called:
        expected = train(family, plain, (2, 2))
    assert fast in called.names
    with Called() as called:
        found = train(family, other, (2, 2))
    assert fast not in called.names and "aten.bmm.default" in called.names
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    alike(plain, other, start, 1e-4)


def test_kernels_are_the_dispatchers() -> None:
    known = {member.value for member in AttentionBackendName}
    assert {row.backend for row in KERNELS.values()} <= known


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_memory_is_that_of_the_kernel(family: str) -> None:
    """Byte for byte on the processor; all scores take more than none."""
    plain = small(family, rank=4, shapes=((256, 256, 2),))
    scores = evolve(plain, attention="native-math")
    check(scores)
    shape = plain.shapes[0]
    more = sum(MODEL.course(scores, shape).train_peak.values())
    assert more > sum(MODEL.course(plain, shape).train_peak.values())


@pytest.mark.parametrize("like", ["flash", "efficient", "math"])
def test_simulated_kernels_are_those_asked_for(like: Any) -> None:
    """On CUDA, in bfloat16: each by its own operation."""
    query = torch.empty(1, 2, 64, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    stock = torch.nn.functional.scaled_dot_product_attention
    with Called() as called:
        out = attention_for("cuda", stock, like)(query, query, query)
    assert out.shape == query.shape
    named = {"flash": "_flash_attention", "efficient": "_efficient_attention", "math": "softmax"}
    assert any(named[like] in name for name in called.names), called.names


def test_what_the_machine_lacks_is_said_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_speed(Speed(), "cpu")
    with pytest.raises(MachineUnfit, match="does not run on cpu"):
        check_speed(Speed(attention="flash"), "cpu")
    with pytest.raises(MachineUnfit, match="needs the package flash-attn") as caught:
        check_speed(Speed(attention="flash"), "cuda")
    assert "speed.attention=native" in caught.value.help
    monkeypatch.setattr(speed_module, "compiler", lambda: "")
    with pytest.raises(MachineUnfit, match=r"need a C\+\+ compiler"):
        check_speed(REGIONAL, "cpu")
    monkeypatch.setattr(speed_module, "compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(speed_module, "version", lambda name: "")
    check_speed(REGIONAL, "cpu")
    with pytest.raises(MachineUnfit, match="triton"):
        check_speed(REGIONAL, "cuda")


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, tiny_sd3: Path, traced: None) -> None:
    """Compiled and with another kernel; the pictures in between are drawn uncompiled."""
    data = draw_data(tmp_path / "data", ((70, 70),) * 4)  # whole batches: of one shape
    plan, manifest = tiny_plan("sd3", tiny_sd3, data, tmp_path / "run", steps=6, every=2)
    speed = Speed(compile="regional", attention="native-math")
    plan = evolve(plan, speed=speed, validation=evolve(PICTURES, every=3, at_start=False))
    whole = execute(plan, manifest, Silent())
    folders = checkpoints.complete(whole.run_folder / "checkpoints")
    last = checkpoints.load(folders[-1])
    assert whole.result is not None and last.step == 6
    for folder in (*folders[1:], whole.result):
        shutil.rmtree(folder)
    again = execute(plan, manifest, Silent())
    found = checkpoints.load(checkpoints.complete(again.run_folder / "checkpoints")[-1])
    assert all(torch.equal(found.weights[n], value) for n, value in last.weights.items())
    plain = execute(
        evolve(plan, speed=Speed(), run_folder=str(tmp_path / "plain")), manifest, Silent()
    )
    other = checkpoints.load(checkpoints.complete(plain.run_folder / "checkpoints")[-1])
    for name, value in last.weights.items():
        torch.testing.assert_close(other.weights[name], value, rtol=1e-3, atol=1e-4)
