"""Running out of memory: told from other errors, survived with what was whole, and explained."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest
import torch
from attrs import evolve
from torch import nn

from compiler import plan as plans
from compiler.plan import Checkpoints, Layout, Plan, Rung
from runtime import checkpoints, loop, measured, training
from runtime.clock import Clock, failed_in
from runtime.data import feed
from runtime.ema import Ema
from runtime.errors import OutOfMemory, RunFailed
from runtime.events import Silent
from runtime.execute import execute
from runtime.offload.host import host_for
from runtime.optimizers import kept_weights
from runtime.out_of_memory import is_out_of_memory, is_torn, let_go, refusal, updating
from runtime.ranks import RanksLost, connected, peers
from runtime.stop import Stop
from tests.runtime.plans import PICTURES, draw_data, tiny_plan
from tests.runtime.run_plan import Interrupting
from tests.runtime.tiny import make_tiny
from tests.runtime.whole_runs import NEVER, assert_equal
from tests.tuner.examples import sd35_large_lora

CPU = torch.device("cpu")
CUDNN = "cuDNN error: CUDNN_STATUS_"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and POSIX signals")


def fails(*arguments: object, **options: object) -> None:
    raise torch.OutOfMemoryError("tried to allocate 2 GiB")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "CUDA driver error: out of memory",
        "HIP error: out of memory",
        "MPS backend out of memory (MPS allocated: 9 GB)",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        f"{CUDNN}ALLOC_FAILED",
        f"{CUDNN}INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        f"{CUDNN}INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ],
)
def test_what_libraries_say_where_no_memory_is_left(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(torch.AcceleratorError(text))
    assert not is_out_of_memory(ValueError(text))  # a setting's, or a file's


def test_what_is_no_lack_of_memory() -> None:
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    for text in (
        "CUDA error: an illegal memory access was encountered",
        "out of resource: shared memory, Required: 147456, Hardware limit: 101376",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED",
        f"{CUDNN}NOT_INITIALIZED",
    ):
        assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("inside", [peers, connected])
def test_connections_without_memory_have_lost_nobody(inside) -> None:
    with pytest.raises(RuntimeError, match="out of memory") as caught, inside():
        raise RuntimeError("NCCL error: unhandled cuda error: Cuda failure 2 'out of memory'")
    assert not isinstance(caught.value, RanksLost)
    with pytest.raises(RanksLost), inside():
        raise RuntimeError("NCCL error: remote process exited")


def test_an_exception_lets_go_of_what_its_frames_held() -> None:
    import weakref

    def step() -> None:
        large = torch.zeros(8)
        watched.append(weakref.ref(large))
        try:
            fails()
        except torch.OutOfMemoryError as error:
            raise RuntimeError("while recomputing: out of memory") from error

    watched: list[weakref.ref[torch.Tensor]] = []
    with pytest.raises(RuntimeError) as caught:
        step()
    assert watched[0]() is not None
    let_go(caught.value)
    assert watched[0]() is None


@pytest.mark.parametrize("release", ["2.9", "2.13"])
def test_pinned_memory_is_given_back_too(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once copies are done; also by a device that answers nothing more."""
    called: list[str] = []

    def mute() -> None:
        called.append("synchronize")
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", mute)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("device"))
    monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    where, name = (torch._C, "_host_emptyCache")
    if release == "2.13":
        where, name = (torch.accelerator, "empty_host_cache")
    monkeypatch.setattr(where, name, lambda: called.append("host"), raising=False)
    let_go()
    assert called == ["synchronize", "device", "host"]


def test_memory_that_can_t_be_pinned_is_the_host_s(tmp_path, monkeypatch) -> None:
    """CUDA says of it what it says of a device that is full; any other error stays."""
    cuda, stock = torch.device("cuda"), torch.empty
    said = ["CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"]

    def empty(*arguments, **options):
        if options.pop("pin_memory", False):
            raise torch.AcceleratorError(said[-1])
        return stock(*arguments, **options)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(MemoryError) as caught:
        host_for([torch.zeros(4)], cuda)
    found = refusal(on_a_rung(tmp_path, "next-rung", **PARTS), "train", caught.value, cuda)
    assert found.on_host and found.message == (
        "the host ran out of memory in phase train: no memory could be pinned: CUDA error: out of "
        "memory"
    )
    assert "next rung" not in found.help
    said.append("CUDA error: an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        host_for([torch.zeros(4)], cuda)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny pipeline, data, and a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("oom")
    make_tiny("sana", folder / "sana")
    draw_data(folder / "dog", ((64, 64),) * 3)
    whole, manifest = planned(folder, folder / "whole")
    execute(whole, manifest, Interrupting(*NEVER))
    return folder, whole, manifest


def planned(folder: Path, run: Path, **changes):
    settings = {
        "steps": 4,
        "ema": plans.Ema(decay=0.9, device="same", every=1),
        "cache_folder": str(folder / "cache"),
        "validation": evolve(PICTURES, every=3, at_start=False),
        "checkpoints": Checkpoints(every=0, keep=0),
        **changes,
    }
    return tiny_plan("sana", folder / "sana", folder / "dog", run, **settings)


def saved_step(plan: Plan) -> int | None:
    saved = checkpoints.latest(Path(plan.run_folder) / "checkpoints")
    return None if saved is None else int(checkpoints.read_state(saved)["step"])


def at_call(number: int, real, fault=fails):
    """`real`, but for its call of this number (from 1)."""
    calls: list[int] = []

    def called(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            fault()
        return real(*arguments, **options)

    return called


def feeding_fails(monkeypatch) -> None:
    monkeypatch.setattr(feed.Feed, "_made", at_call(4, feed.Feed._made))


def averaging_fails(monkeypatch) -> None:
    """Where it makes copies; one tensor after the other there is room."""
    real, calls = Ema.update, []

    def update(self, done: int, *, in_turn: bool = False) -> None:
        calls.append(done)
        if done == 3 and not in_turn:
            fails()
        real(self, done, in_turn=in_turn)

    monkeypatch.setattr(Ema, "update", update)


def drawing_fails(monkeypatch) -> None:
    """With the average in the weights' place."""
    monkeypatch.setattr("runtime.validate._embeddings", fails)


def copying_fails(monkeypatch) -> None:
    monkeypatch.setattr(training, "_copied", at_call(1, training._copied))


def looking_fails(monkeypatch) -> None:
    monkeypatch.setattr(Stop, "look", at_call(3, Stop.look))


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        (feeding_fails, "train"),
        (averaging_fails, "train"),
        (drawing_fails, "validate"),
        (copying_fails, "save"),
        (looking_fails, "train"),
    ],
)
def test_every_whole_step_is_saved_and_gone_on_with(fault, phase, place, tmp_path) -> None:
    """Between two updates as in one: three steps are made, and the run ends as if nothing was."""
    folder, whole, manifest = place
    every = 3 if fault is copying_fails else 0
    plan, _ = planned(folder, tmp_path / "run", checkpoints=Checkpoints(every=every, keep=0))
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        with pytest.raises(OutOfMemory, match=f"in phase {phase}") as caught:
            execute(plan, manifest, Interrupting(*NEVER))
    assert caught.value.phase == phase
    assert saved_step(plan) == 3
    assert caught.value.help.startswith("the run goes on from step 3; ")
    execute(plan, manifest, Interrupting(*NEVER))
    assert_equal(plan, whole)


def test_half_an_average_is_not_saved(place, tmp_path, monkeypatch) -> None:
    folder, _, manifest = place
    plan, _ = planned(folder, tmp_path / "run", checkpoints=Checkpoints(every=2, keep=0))
    real = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", at_call(3, real))
    with pytest.raises(OutOfMemory) as caught:
        execute(plan, manifest, Interrupting(*NEVER))
    assert saved_step(plan) == 2
    assert "goes on from step 2, for weights were being changed" in caught.value.help


def test_a_step_that_can_t_be_saved_hides_no_cause(place, tmp_path, monkeypatch) -> None:
    """After some errors a device answers nothing more; the first one, and its phase, are told."""
    folder, _, manifest = place
    plan, _ = planned(folder, tmp_path / "run")

    def gone() -> None:
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(loop, "micro_step", at_call(3, loop.micro_step, gone))
    monkeypatch.setattr(training, "_copied", fails)
    events = Interrupting(*NEVER)
    with pytest.raises(OutOfMemory, match=r"phase train: CUDA error: out of memory$") as caught:
        execute(plan, manifest, events)
    assert caught.value.phase == "train" and saved_step(plan) is None
    assert caught.value.help.startswith("the run begins anew; ")
    assert any("could not be saved: tried to allocate 2 GiB" in text for text in events.texts)


@pytest.mark.parametrize("forward", [True, False])
def test_a_fused_backward_pass_tears_from_its_beginning_on(
    forward, place, tmp_path, monkeypatch
) -> None:
    """In the forward pass no weight has changed yet."""
    folder, _, manifest = place
    layout = evolve(planned(folder, tmp_path)[0].memory, layout=Layout(fused_backward=True))
    given = {"adapter": None, "ema": None, "memory": layout, "max_grad_norm": 0.0}
    plan, _ = planned(folder, tmp_path / "run", **given)
    real, calls = loop.micro_step, []

    def micro_step(*arguments):
        calls.append(1)
        if len(calls) == 3 and forward:
            fails()
        found = real(*arguments)
        if len(calls) == 3:
            fails()
        return found

    monkeypatch.setattr(loop, "micro_step", micro_step)
    with pytest.raises(OutOfMemory):
        execute(plan, manifest, Interrupting(*NEVER))
    assert saved_step(plan) == (2 if forward else None)


def averages(count: int = 3) -> tuple[Ema, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.randn(5).bfloat16()) for _ in range(count)]
    named = [(f"p{index}", p) for index, p in enumerate(parameters)]
    ema = Ema(plans.Ema(decay=0.9, device="same", every=1), named)
    with torch.no_grad():
        for p in parameters:
            p.add_(1.0)
    return ema, parameters


def test_an_average_taken_in_turn_has_the_same_bits() -> None:
    torch.manual_seed(0)
    once, _ = averages()
    torch.manual_seed(0)
    in_turn, _ = averages()
    once.update(1)
    in_turn.update(1, in_turn=True)
    assert all(torch.equal(once.average[n], in_turn.average[n]) for n in once.average)


def test_an_average_is_torn_only_where_it_is_changed(monkeypatch) -> None:
    ema, _ = averages()
    before = {name: a.clone() for name, a in ema.average.items()}
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", fails)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            ema.update(1)
    assert not is_torn(caught.value)
    assert all(torch.equal(ema.average[name], a) for name, a in before.items())
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", at_call(2, torch.Tensor.to))
        with pytest.raises(torch.OutOfMemoryError) as caught:
            ema.update(1, in_turn=True)
    assert is_torn(caught.value)
    assert not torch.equal(ema.average["p0"], before["p0"])


def test_weights_that_could_not_all_be_swapped_are_put_back(monkeypatch) -> None:
    ema, parameters = averages()
    before = [p.detach().clone() for p in parameters]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", at_call(2, torch.Tensor.copy_))
        with pytest.raises(torch.OutOfMemoryError) as caught, ema.swapped():
            pass
    assert not is_torn(caught.value)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    with monkeypatch.context() as patch:  # while they are put back
        patch.setattr(torch.Tensor, "copy_", at_call(5, torch.Tensor.copy_))
        with pytest.raises(torch.OutOfMemoryError) as caught, ema.swapped():
            pass
    assert is_torn(caught.value)


def test_weights_that_could_not_all_be_turned_are_put_back() -> None:
    """Of a schedule-free optimizer."""

    class Turning(torch.optim.SGD):
        def eval(self) -> None:
            with torch.no_grad():
                p.add_(1.0)
            fails()

    p = nn.Parameter(torch.zeros(2))
    optimizer = Turning([p], lr=0.1)
    with pytest.raises(torch.OutOfMemoryError) as caught, kept_weights(optimizer, [p]):
        pass
    assert not is_torn(caught.value)
    assert torch.equal(p, torch.zeros(2))


def test_each_exception_knows_its_own_phase() -> None:
    clock = Clock(CPU)
    with pytest.raises(RuntimeError, match="first") as caught, clock.phase("train"):
        try:
            raise RuntimeError("first")
        except RuntimeError:
            with pytest.raises(RuntimeError) as second, clock.phase("save"):
                raise RuntimeError("second") from None
            raise
    assert failed_in(caught.value) == "train" and failed_in(second.value) == "save"
    assert failed_in(RuntimeError()) == ""


GIB = 1 << 30
CHECKPOINTING = "memory.activation_checkpointing"


def on_a_rung(run: Path, on_oom="stop", peak=19, begun=False, **changed: str) -> Plan:
    """A plan whose next rung needs `peak` GiB and has other settings; as a begun run's or a new."""
    keys = {name: name.replace("__", ".") for name in changed}
    here = {CHECKPOINTING: "2"} | dict.fromkeys(keys.values(), "before")
    below = here | {keys[name]: value for name, value in changed.items()}
    rungs = [(here, 20, True), (below, peak, False)]
    plan = sd35_large_lora()
    phases = (
        plans.Phase(name="train", device_bytes=20 * GIB, host_bytes=0, parts={}),
        plans.Phase(name="validate", device_bytes=15 * GIB, host_bytes=0, parts={}),
    )
    memory = plans.Memory(
        budget_bytes=21 * GIB,
        on_oom=on_oom,
        phases=phases,
        ladder=tuple(
            Rung(
                settings=settings,
                peak_bytes=size * GIB,
                relative_time=1.0,
                alters=False,
                chosen=chosen,
            )
            for settings, size, chosen in rungs
        ),
    )
    if begun:
        run.mkdir(exist_ok=True)
        (run / "metrics.jsonl").write_text("{}\n")
    return evolve(plan, run_folder=str(run), memory=memory)


def help_of(plan: Plan, phase: str) -> str:
    return refusal(plan, phase, torch.OutOfMemoryError("x"), CPU).help


QUANTIZED = {"model__transformer__quantize": "nf4"}
OPTIMIZER = {"train__optimizer__name": "adamw-8bit"}
PARTS = {"memory__micro_batch": "1"}
BY_ITSELF = 'on_oom = "next-rung"'


def test_a_rung_is_advised_that_this_run_can_take(tmp_path) -> None:
    offload = {"memory__offload__blocks": "9"}
    options = "run it again with --set memory.offload.blocks=9"
    for begun in (False, True):
        found = help_of(on_a_rung(tmp_path, begun=begun, **offload), "train")
        assert f"the next rung needs 19.0 GiB: {options}, or say {BY_ITSELF}" in found
    found = help_of(on_a_rung(tmp_path, begun=True, **PARTS), "train")
    assert "--set memory.micro_batch=1 --accept-change steps.micro_batch, or say" in found


@pytest.mark.parametrize("changed", [OPTIMIZER, QUANTIZED])
def test_what_a_begun_run_refuses_takes_a_fresh_one(changed, tmp_path) -> None:
    (key, value) = next(iter(changed.items()))
    option = f"--set {key.replace('__', '.')}={value}"
    assert f"run it again with {option}" in help_of(on_a_rung(tmp_path, **changed), "train")
    found = help_of(on_a_rung(tmp_path, begun=True, **changed), "train")
    assert f"that takes a fresh run (another `name`) with {option}" in found
    assert "which goes on with what this run can take" in found


def test_what_is_set_already_is_not_advised(tmp_path) -> None:
    for begun in (False, True):
        plan = on_a_rung(tmp_path, "next-rung", begun=begun, **PARTS)
        assert "on_oom" not in help_of(plan, "train")


def test_a_rung_that_needs_more_than_the_phase_is_no_advice(tmp_path) -> None:
    found = help_of(on_a_rung(tmp_path, **PARTS), "validate")
    assert "next rung" not in found and "draw smaller pictures" in found
    assert "next rung" in help_of(on_a_rung(tmp_path, peak=14, **PARTS), "validate")


def test_encoding_is_on_no_rung(tmp_path) -> None:
    """Nothing is said there of the ladder, and only of what this run can take."""
    new = {p: help_of(on_a_rung(tmp_path, **PARTS), p) for p in ("text_encoder_3", "latents")}
    assert new["text_encoder_3"].endswith("or with --set model.text_encoder_3.quantize=int8")
    assert new["latents"].endswith("or with --set model.vae.tiling=true")
    learning = plans.Embeddings(encoders=("text_encoder_3",), tokens=(), lr=1.0, until=9)
    learns = evolve(on_a_rung(tmp_path, **PARTS), embeddings=learning)
    assert help_of(learns, "text_encoder_3").endswith("memory of the device and run it again")
    batched = evolve(on_a_rung(tmp_path, **PARTS), vae_batch=4)
    assert help_of(batched, "latents").endswith("or with --set cache.batch=1")
    for phase in ("text_encoder_3", "latents", "text"):
        found = help_of(on_a_rung(tmp_path, begun=True, **PARTS), phase)
        assert "--set" not in found and "rung" not in found
        assert "run it again" in found


def test_the_host_s_memory_is_told_from_the_device_s(tmp_path, monkeypatch) -> None:
    """And a device that answers nothing more is not asked for long."""

    def mute(_: object) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", mute)
    plan, cuda = on_a_rung(tmp_path, **PARTS), torch.device("cuda")
    found = refusal(plan, "train", torch.OutOfMemoryError("CUDA out of memory"), cuda)
    assert not found.on_host
    assert found.message == (
        "cuda ran out of memory in phase train, for which 20.0 GiB were planned: CUDA out of memory"
    )
    for error in (MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")):
        found = refusal(plan, "save", error, cuda)
        assert found.on_host and found.message.startswith(
            "the host ran out of memory in phase save"
        )
        assert found.help.endswith("close what else takes host memory and run it again")


def test_a_mark_stays_with_its_exception() -> None:
    with pytest.raises(RunFailed) as caught, updating():
        raise RunFailed("in the middle")
    assert is_torn(caught.value) and not is_torn(RunFailed("another"))


def test_measuring_after_the_training_fails_no_run(tmp_path, monkeypatch) -> None:
    """Its result is written by then. Any other error is one."""
    base, data = tmp_path / "base", draw_data(tmp_path / "data")
    make_tiny("sana", base)
    plan, manifest = tiny_plan("sana", base, data, tmp_path / "run", steps=1)
    monkeypatch.setattr(measured, "step_parts", fails)
    assert execute(plan, manifest, Silent()).status == "finished"
    rows = json.loads((tmp_path / "run" / "measured.json").read_text())["memory"]
    assert "latents" in rows and "train" not in rows

    def mistaken(*_: object) -> None:
        raise RuntimeError("another")

    monkeypatch.setattr(measured, "step_parts", mistaken)
    plan, manifest = tiny_plan("sana", base, data, tmp_path / "other", steps=1)
    with pytest.raises(RuntimeError, match="another"):
        execute(plan, manifest, Silent())
