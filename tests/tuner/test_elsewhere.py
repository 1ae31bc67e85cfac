"""Plans for devices that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from compiler.devices import named, names
from compiler.machine import COMPILER, TRITON, Machine
from compiler.plan import Layout
from compiler.units import ByteSize
from tests.compiler.recipes import GPU, MACHINE, RECIPE, compiled, project
from tests.compiler.test_ladder import OPEN, Formula
from tuner.elsewhere import UnknownDevice, elsewhere

GIB = 2**30


@pytest.mark.parametrize(
    ("word", "memory"),
    [
        ("rtx-4090", 23.5 * GIB),
        ("RTX 4090", 23.5 * GIB),
        ("NVIDIA GeForce RTX 3060", 11.7 * GIB),
        ("RTX4080", 15.6 * GIB),
        ("rtx4070tisuper", 15.6 * GIB),
        ("a100-40gb", 39.4 * GIB),
        ("a100 80gb", 79.1 * GIB),
        ("l4", 21.9 * GIB),
        ("rtx-4060-ti-8gb", 7.8 * GIB),
        ("RTX 3080 12GB", 11.7 * GIB),
        ("24 GiB", 24 * GIB),
        ("8 GB", 8 * 10**9),
    ],
)
def test_memory_of_a_device(word: str, memory: float) -> None:
    """What it offers, not what is advertised; an amount is that amount."""
    machine = elsewhere(MACHINE, word)
    assert machine.device == "cuda"
    assert machine.device_free_bytes == machine.device_total_bytes
    assert machine.device_total_bytes == pytest.approx(int(memory), abs=1)
    assert machine.cores == MACHINE.cores


def test_an_old_one_has_no_bfloat16() -> None:
    old = elsewhere(MACHINE, "tesla-t4")
    assert not old.bf16 and old.capability == "7.5"
    assert elsewhere(MACHINE, "h100-pcie").capability == "9.0"
    assert elsewhere(MACHINE, "16 GiB").bf16


@pytest.mark.parametrize("word", ["3060", "4090", "4060 ti 16gb", "a6000", "4070ti"])
def test_the_number_of_a_card_is_enough(word: str) -> None:
    spaced = word.replace("70ti", "70 ti")
    assert elsewhere(MACHINE, word) == elsewhere(MACHINE, f"rtx {spaced}")


@pytest.mark.parametrize("word", ["24", "24gb", "24 g"])
def test_an_amount_without_its_unit_is_answered_with_it(word: str) -> None:
    with pytest.raises(UnknownDevice, match="did you mean `24 GiB`"):
        elsewhere(MACHINE, word)


@pytest.mark.parametrize(
    ("word", "guess"),
    [("3080", "rtx-3080-12gb"), ("1080", ""), ("0", ""), (".", "")],
)
def test_what_is_no_amount_is_not_taken_for_one(word: str, guess: str) -> None:
    with pytest.raises(UnknownDevice) as caught:
        elsewhere(MACHINE, word)
    assert f"{word} GiB" not in str(caught.value)
    assert f"did you mean `{guess}" in str(caught.value) if guess else True


@pytest.mark.parametrize(
    ("word", "guess"), [("2080", "rtx-2080-ti"), ("rtx-6000", "rtx-a6000"), ("7900", "")]
)
def test_another_number_is_another_card(word: str, guess: str) -> None:
    with pytest.raises(UnknownDevice) as caught:
        elsewhere(MACHINE, word)
    said = str(caught.value)
    assert f"did you mean `{guess}`" in said if guess else "did you mean" not in said


def test_no_memory_is_not_proposed_again() -> None:
    with pytest.raises(UnknownDevice) as caught:
        elsewhere(MACHINE, "0 GiB")
    assert "did you mean" not in str(caught.value)


def test_what_is_missing_here_is_not_missing_there(tmp_path: Path) -> None:
    """PyTorch for CUDA brings triton; so the optimizer's states may be kept in 8 bits."""
    bare = evolve(MACHINE, missing=(TRITON, COMPILER, "bitsandbytes"))
    machine = elsewhere(bare, "1060 MiB")
    assert machine.missing == ("bitsandbytes",) and not machine.here and bare.here
    recipe = project(tmp_path, RECIPE.replace("batch_size = 2", "batch_size = 1") + OPEN)
    plan = compiled(
        recipe, "memory.offload=none", "memory.activation_checkpointing=1",
        "model.transformer.quantize=none", machine=machine, memory_model=Formula(),
    ).plan  # fmt: skip
    assert plan is not None and plan.optimizer.name == "adamw-8bit"


@pytest.mark.parametrize("word", ["gtx-9999", "toaster", "", "24 parsecs", "-3 GiB", "nan GiB"])
def test_others_are_refused_with_a_hint(word: str) -> None:
    with pytest.raises(UnknownDevice, match="24 GiB"):
        elsewhere(MACHINE, word)


@pytest.mark.parametrize(
    "word", ["rtx-3080", "RTX-4060-Ti", "rtx 3080", "RTX_3080", "rtx  4060 ti"]
)
def test_one_that_comes_in_several_sizes(word: str) -> None:
    plain = "-".join(word.lower().replace("_", " ").split())
    with pytest.raises(UnknownDevice, match=rf"did you mean `{plain}-\d+gb`"):
        elsewhere(MACHINE, word)


def test_every_name_that_is_offered_is_known() -> None:
    assert len(names()) > 30
    assert all(named(name) is not None for name in names())


@pytest.mark.parametrize(
    ("machine", "memory", "why"),
    [
        (GPU, GPU.device_free_bytes, "free on the device now"),
        (elsewhere(MACHINE, "l40s"), int(44.4 * GIB), "what L40S offers of its 48 GiB"),
        (elsewhere(MACHINE, "1100 MiB"), 1100 * 2**20, "all of what `--device` says"),
    ],
)
def test_an_open_budget_is_what_the_device_has_free(
    machine: Machine, memory: int, why: str, tmp_path: Path
) -> None:
    """And settings that are open are chosen by it: the fastest that fits."""
    recipe = project(tmp_path, RECIPE.replace("batch_size = 2", "batch_size = 4") + OPEN)
    plan = compiled(recipe, machine=machine, memory_model=Formula()).plan
    assert plan is not None and plan.memory.budget_bytes == memory
    reasons = {decision.key: decision for decision in plan.decisions}
    assert reasons["memory.budget"].why == why
    saves = plan.memory.layout != Layout()
    assert saves == (memory < 1400 * 2**20)
    assert max(phase.device_bytes for phase in plan.memory.phases) <= memory


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tuner.cli import run_command

    recipe = project(tmp_path)
    assert run_command(["plan", str(recipe), "--device", "toaster"]) == 2
    assert "no device `toaster` is known" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["recipe", "override"])
@pytest.mark.parametrize(("budget", "larger"), [("1200 MiB", False), ("4 GiB", True)])
def test_a_stated_budget_stays(
    budget: str, larger: bool, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device with 2 GiB; what it does not have is pointed out, where it is stated."""
    from tuner import compiling

    monkeypatch.setattr(compiling, "_machine", lambda: MACHINE)
    monkeypatch.setattr(compiling, "_memory_model", lambda *_: Formula())
    stated = f'[memory]\nbudget = "{budget}"\n'
    recipe = project(tmp_path, RECIPE + OPEN + (stated if by == "recipe" else ""))
    overrides = [f'memory.budget="{budget}"'] if by == "override" else []
    found = compiling.compile_here(recipe, overrides, device="2 GiB")
    assert found.plan is not None
    assert found.plan.memory.budget_bytes == int(ByteSize.parse(budget))
    told = [fault for fault in found.diagnostics if fault.code == "budget-too-large"]
    assert len(told) == larger
    assert all((fault.span.file == "--set") == (by == "override") for fault in told)


def test_memory_that_looks_the_same_is_told_apart(tmp_path: Path) -> None:
    """A plan needs a little more than the device has, and both round to one number."""
    recipe = project(tmp_path, RECIPE + OPEN)
    asked = 'memory.budget="none"'
    plan = compiled(recipe, asked, machine=GPU, memory_model=Formula()).plan
    assert plan is not None
    needed = max(phase.device_bytes for phase in plan.memory.phases)
    machine = evolve(GPU, device_total_bytes=needed - 300 * 2**10)
    faults = compiled(recipe, asked, machine=machine, memory_model=Formula()).diagnostics
    (fault,) = [fault for fault in faults if fault.code == "budget-too-large"]
    assert fault.message.startswith("this plan needs 300 KiB more than the ")
    assert fault.message.endswith(" of a card: the run would end for want of memory")


def test_what_does_not_fit_blames_nothing_that_nobody_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner import compiling

    monkeypatch.setattr(compiling, "_machine", lambda: MACHINE)
    monkeypatch.setattr(compiling, "_memory_model", lambda *_: Formula())
    found = compiling.compile_here(project(tmp_path, RECIPE + OPEN), [], device="40 MiB")
    (fault,) = [fault for fault in found.diagnostics if fault.code == "does-not-fit"]
    assert fault.span.file != "--set" and "the budget of 40 MiB" in fault.message
