"""Compiled blocks, kernels of attention, TF32, and float16: what is decided and what refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from compiler.attention import KERNELS
from compiler.diagnostics import render
from compiler.machine import COMPILER, TRITON, Machine
from compiler.plan import Plan, Speed, alters_trajectory
from tests.compiler.recipes import GPU, MACHINE, RECIPE, FixedMemory, codes, compiled, project
from tuner.plan_view import text

LORA = 'adapter={kind="lora"}'
OLD = evolve(GPU, capability="7.5", bf16=False)


def planned(folder: Path, *overrides: str, family: str = "sd3", machine: Machine = GPU) -> Plan:
    path = folder / "recipe.toml"
    if not path.exists():
        project(folder, RECIPE.replace('"sana"', f'"{family}"'), family)
    result = compiled(path, LORA, *overrides, machine=machine, memory_model=FixedMemory())
    assert result.plan is not None, [render(f, result.texts) for f in result.diagnostics]
    return result.plan


def refused(
    folder: Path, *overrides: str, family: str = "sd3", machine: Machine = GPU
) -> tuple[str, str, str]:
    """Code, message and help of the only error."""
    path = folder / "recipe.toml"
    if not path.exists():
        project(folder, RECIPE.replace('"sana"', f'"{family}"'), family)
    result = compiled(path, LORA, *overrides, machine=machine)
    (fault,) = (f for f in result.diagnostics if f.severity == "error")
    return fault.code, fault.message, fault.help


def why(plan: Plan, key: str) -> tuple[str, str]:
    (found,) = (d for d in plan.decisions if d.key == key)
    return found.value, found.why


def test_nothing_is_on_by_default(tmp_path: Path) -> None:
    for machine in (GPU, MACHINE):
        plan = planned(tmp_path, machine=machine)
        assert plan.speed == Speed()
        value, reason = why(plan, "speed.compile")
        assert value == "off" and "min" in reason and "long run" in reason
        assert why(plan, "speed.attention")[0] == "native"
    assert alters_trajectory("speed.compile") and alters_trajectory("speed.tf32")
    assert planned(tmp_path, "speed.tf32=true").digest != planned(tmp_path).digest


def test_what_is_on_is_in_the_plan(tmp_path: Path) -> None:
    asked = ('speed.compile="regional"', 'speed.attention="native-flash"', "speed.tf32=true")
    plan = planned(tmp_path, *asked)
    assert plan.speed == Speed(compile="regional", attention="native-flash", tf32=True)
    assert "\n  blocks compiled for 2 shapes, attention by native-flash, TF32\n" in text(
        plan, recipe="recipe.toml"
    )


def test_a_family_whose_prompts_have_no_one_length(tmp_path: Path) -> None:
    given = 'speed.compile="regional"'
    code, message, _ = refused(tmp_path, given, family="z_image")
    assert code == "conflict" and "blocks of Z-Image can't be compiled" in message


def test_prompts_of_different_lengths_are_padded_for_compiled_blocks(tmp_path: Path) -> None:
    plan = planned(tmp_path, 'speed.compile="regional"', family="sana")
    assert plan.speed.tokens == plan.text.max_length == 300
    assert planned(tmp_path).speed.tokens == 0


@pytest.mark.parametrize(
    ("kernel", "family", "machine", "words"),
    [
        ("sage", "sd3", GPU, "no backward pass"),
        ("flash", "sd3", MACHINE, "does not run on cpu"),
        ("xformers", "sd3", MACHINE, "does not run on cpu"),
        ("flash-3", "sd3", GPU, "needs compute capability 9, and this device has 8.9"),
        ("native-flash", "sana", GPU, "takes no mask, and Sana masks the padding"),
        ("native-cudnn", "sd3", OLD, "needs compute capability 8, and this device has 7.5"),
    ],
)
def test_kernels_that_can_not(
    tmp_path: Path, kernel: str, family: str, machine: Machine, words: str
) -> None:
    given = f'speed.attention="{kernel}"'
    code, message, advice = refused(tmp_path, given, family=family, machine=machine)
    assert code == "attention-unfit" and words in message
    assert f"`{kernel}`" in message and f"`{kernel}`" not in advice and "`native`" in advice


def test_a_kernel_that_knows_bfloat16_on_newer_devices(tmp_path: Path) -> None:
    given = ('speed.attention="native-efficient"', 'precision.compute="bf16"')
    code, message, _ = refused(tmp_path, *given, machine=evolve(OLD, bf16=True))
    assert code == "attention-unfit" and "bfloat16 from compute capability 8 on" in message
    fp16 = ('speed.attention="native-efficient"', 'precision.compute="fp16"')
    found = compiled(project(tmp_path / "b"), *fp16, machine=OLD)
    assert not [f for f in found.diagnostics if f.code == "attention-unfit"]


def test_a_kernel_for_other_formats(tmp_path: Path) -> None:
    given = ('speed.attention="native-flash"', 'precision.compute="fp32"')
    code, message, _ = refused(tmp_path, *given)
    assert code == "attention-unfit" and "computes `bfloat16`, `float16`, not float32" in message


@pytest.mark.parametrize("kernel", [k for k, row in KERNELS.items() if row.backward])
def test_each_kernel_suits_some_plan(tmp_path: Path, kernel: str) -> None:
    machine = evolve(GPU, capability="9.0")
    assert planned(tmp_path, f'speed.attention="{kernel}"', machine=machine).speed.attention


@pytest.mark.parametrize(
    ("given", "machine", "lacks"),
    [
        ('speed.attention="flash"', GPU, "flash-attn"),
        ('speed.compile="regional"', GPU, TRITON),
        ('speed.compile="regional"', MACHINE, COMPILER),
    ],
)
def test_what_this_machine_lacks_is_a_warning(
    tmp_path: Path, given: str, machine: Machine, lacks: str
) -> None:
    planned(tmp_path)
    poor = evolve(machine, missing=(lacks,))
    path = tmp_path / "recipe.toml"
    assert "missing-package" in codes(compiled(path, LORA, given, machine=poor))
    assert "missing-package" not in codes(compiled(path, LORA, given, machine=machine))
    elsewhere = evolve(MACHINE, missing=(lacks,))
    if machine is GPU:  # planned for a device that is not here, whose machine may have it
        away = compiled(path, LORA, given, 'launch.device="cuda"', machine=elsewhere)
        assert "missing-package" not in codes(away)


def test_tf32_is_of_cuda(tmp_path: Path) -> None:
    assert refused(tmp_path, "speed.tf32=true", machine=MACHINE)[0] == "no-effect"
    assert refused(tmp_path, "speed.tf32=true", machine=OLD)[0] == "no-effect"
    assert planned(tmp_path, "speed.tf32=true").speed.tf32


def test_compiled_blocks_exclude(tmp_path: Path) -> None:
    given = ('speed.compile="regional"', "memory.fused_backward=true", "train.max_grad_norm=0")
    code, message, _ = refused(tmp_path, *given)
    assert code == "fused-backward" and "compiled block" in message
    given = ('speed.compile="regional"', "launch.devices=2", 'launch.strategy="fsdp"')
    assert "compiled block" in refused(tmp_path, *given)[1]


@pytest.mark.parametrize("adapter", [LORA, "seed=0"], ids=["lora", "full"])
def test_float16_where_the_family_holds_it(tmp_path: Path, adapter: str) -> None:
    planned(tmp_path)
    path = tmp_path / "recipe.toml"
    plan = compiled(path, adapter, 'precision.compute="fp16"', machine=OLD).plan
    assert plan is not None
    precision = plan.precision
    assert (precision.compute, precision.weights) == ("float16", "float16")
    assert precision.trained == "float32"
    assert "float16 compute" in text(plan, recipe="recipe.toml") and "loss scaled" in text(
        plan, recipe="recipe.toml"
    )


def test_float16_needs_all_gradients_before_an_update(tmp_path: Path) -> None:
    given = ('precision.compute="fp16"', "memory.fused_backward=true", "train.max_grad_norm=0")
    code, message, _ = refused(tmp_path, *given)
    assert code == "fused-backward" and "float16" in message


def test_float16_on_a_family_that_overflows(tmp_path: Path) -> None:
    code, message, _ = refused(tmp_path, 'precision.compute="fp16"', family="sana")
    assert code == "fp16-overflow" and "65504" in message


@pytest.mark.parametrize("name", ["fuse_qkv", "fuse_qkv_projections", "fused-qkv"])
def test_fused_projections_have_other_names_elsewhere(tmp_path: Path, name: str) -> None:
    result = compiled(project(tmp_path), f"speed.{name}=true")
    assert codes(result) == ["unknown-key"]
    assert "`fused_projections`" in result.diagnostics[0].help


def test_fused_projections_are_in_the_plan(tmp_path: Path) -> None:
    plan = planned(tmp_path, "speed.fused_projections=true")
    assert plan.speed == Speed(fused_projections=True)
    assert "\n  fused projections\n" in text(plan, recipe="recipe.toml")
    assert why(plan, "speed.fused_projections")[0] == "true"
    assert alters_trajectory("speed.fused_projections")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ('speed.compile="regional"', "a compiled block knows its layers one by one"),
        ('model.transformer.quantize="int8"', "weights in int8 are turned back layer by layer"),
        ("memory.offload={blocks=2}", "weights that wait on the host are moved one by one"),
        ('adapter={kind="oft"}', "OFT gives each of them another input"),
    ],
)
def test_fused_projections_exclude(tmp_path: Path, given: str, words: str) -> None:
    code, message, _ = refused(tmp_path, "speed.fused_projections=true", given)
    assert code == "conflict" and words in message


def test_weights_that_are_dealt_out_are_not_fused(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE.replace('"sana"', '"sd3"'), "sd3")
    for strategy in ("fsdp", "deepspeed"):
        given = ("speed.fused_projections=true", "launch.devices=2")
        found = compiled(path, *given, f'launch.strategy="{strategy}"', machine=GPU)
        (fault,) = (f for f in found.diagnostics if f.severity == "error")
        assert (fault.code, fault.path) == ("not-sharded", "speed.fused_projections")
    free = compiled(path, *given, machine=GPU, memory_model=FixedMemory()).plan
    assert free is not None and free.sharing.strategy == "ddp" and free.speed.fused_projections


def test_fused_weights_are_neither_quantised_nor_moved_to_fit(tmp_path: Path) -> None:
    """By the ladder, nor by what is suggested where nothing fits."""
    path = project(tmp_path, RECIPE.replace('"sana"', '"sd3"'), "sd3")
    given = (LORA, 'model.transformer.quantize="auto"', 'memory.budget="1 MiB"')
    for fused in (False, True):
        model, word = FixedMemory(), str(fused).lower()
        asked = (*given, f"speed.fused_projections={word}")
        assert "does-not-fit" in codes(compiled(path, *asked, machine=GPU, memory_model=model))
        parts = [part for step in model.asked for part in step.model.components]
        kinds = {part.quantize for part in parts if part.name == "transformer"}
        assert (kinds == {"none"}) is fused
        assert (not any(step.layout.offload_blocks for step in model.asked)) is fused
