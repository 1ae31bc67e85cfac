"""How several devices share the work: what is chosen, and what can't go with sharded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from compiler.memory import Candidate, Simulation
from compiler.plan import Phase, Sharing
from tests.compiler.recipes import GPU, RECIPE, codes, compiled, project

MIB = 2**20
ADAPTER = '[adapter]\nkind = "lora"\nrank = 4\n'
FSDP = ("launch.devices=2", 'launch.strategy="fsdp"')


class Shared:
    """Memory of which each rank needs its share, if it is sharded; nothing else helps."""

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`."""
        sharded = candidate.sharing.strategy == "fsdp"
        needed = 1000 * MIB // (candidate.ranks if sharded else 1)
        phase = Phase(name="train", device_bytes=needed, host_bytes=0, parts={"weights": needed})
        return Simulation(
            phases=(phase,),
            parameters=10**6,
            trainable=10**6,
            adapted_modules=0,
            flops=10**9,
            seconds=0.0,
        )


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return project(tmp_path, RECIPE.replace("batch_size = 4", "batch_size = 1"))


def decision(result, key: str) -> tuple[str, str]:
    (found,) = (d for d in result.plan.decisions if d.key == key)
    return found.value, found.why


def budget(size: str) -> str:
    return f'memory.budget="{size}"'


def test_whole_models_as_long_as_they_fit(full: Path) -> None:
    """Then sharded ones, if nothing stands against it and the recipe leaves it open."""
    cases = {
        (budget("1100 MiB"),): "ddp",
        (budget("600 MiB"),): "fsdp",
        ('memory.budget="none"',): "ddp",
    }
    for overrides, strategy in cases.items():
        found = compiled(full, "launch.devices=2", *overrides, machine=GPU, memory_model=Shared())
        assert found.plan is not None, found.diagnostics
        assert found.plan.sharing == Sharing(strategy=strategy)
        assert decision(found, "launch.strategy")[0] == strategy
    for stays in ('launch.strategy="ddp"', 'train.optimizer.name="muon"'):
        found = compiled(
            full, "launch.devices=2", budget("600 MiB"), stays, machine=GPU, memory_model=Shared()
        )
        assert "does-not-fit" in codes(found)
    found = compiled(full, budget("600 MiB"), machine=GPU, memory_model=Shared())
    assert "does-not-fit" in codes(found), "one device has nobody to share with"


def test_what_the_recipe_says_is_done(full: Path) -> None:
    found = compiled(full, *FSDP, "launch.reshard_after_forward=false").plan
    assert found is not None and found.sharing == Sharing(strategy="fsdp", reshard=False)
    assert compiled(full, *FSDP).plan.sharing.reshard
    assert compiled(full).plan.sharing == Sharing()


REFUSED = {
    'train.optimizer.name="adafactor"': "train.optimizer.name",
    'train.optimizer.name="adamw-8bit"': "train.optimizer.name",
    'train.optimizer.name="adamw-offload"': "train.optimizer.name",
    "memory.offload={activations=true}": "memory.offload.activations",
    'speed.compile="regional"': "speed.compile",
    'launch.device="mps"': "launch.device",
}


@pytest.mark.parametrize(("override", "path"), REFUSED.items())
def test_what_cant_be_sharded_is_refused_by_name(full: Path, override: str, path: str) -> None:
    found = compiled(full, *FSDP, override)
    (fault,) = (f for f in found.diagnostics if f.code == "not-sharded")
    assert fault.path == path
    assert 'strategy = "ddp"' in fault.help


def test_quantised_weights_and_base_targets_are_refused(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + ADAPTER)
    for override, blamed in (
        ('model.transformer.quantize="int8"', "model.transformer.quantize"),
        ("memory.offload={blocks=2}", "memory.offload.blocks"),
    ):
        found = compiled(path, *FSDP, override, machine=GPU)
        (fault,) = (f for f in found.diagnostics if f.code == "not-sharded")
        assert fault.path == blamed


def test_settings_without_effect_are_refused(full: Path) -> None:
    for overrides in (
        ("launch.devices=1", "launch.reshard_after_forward=true"),
        ("launch.devices=2", 'launch.strategy="ddp"', "launch.reshard_after_forward=true"),
    ):
        (fault,) = compiled(full, *overrides).diagnostics
        assert (fault.code, fault.path) == ("no-effect", "launch.reshard_after_forward")


def test_a_setting_of_a_strategy_that_was_not_taken_is_warned_of(full: Path) -> None:
    given = ("launch.devices=2", "launch.reshard_after_forward=false")
    (fault,) = compiled(full, *given).diagnostics
    assert (fault.code, fault.severity) == ("no-effect", "warning")
    assert fault.path == "launch.reshard_after_forward"
    assert '"auto" came to be "ddp"' in fault.message
    taken = compiled(full, *given, budget("600 MiB"), machine=GPU, memory_model=Shared())
    assert taken.plan is not None and taken.plan.sharing == Sharing(strategy="fsdp", reshard=False)
    assert "no-effect" not in codes(taken)


def test_a_sharded_run_is_offered_no_saving_that_it_cant_take(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + ADAPTER + '[model.transformer]\nquantize = "auto"\n')
    asked: list[Candidate] = []

    class Noted(Shared):
        def simulate(self, candidate: Candidate) -> Simulation:
            asked.append(candidate)
            return super().simulate(candidate)

    compiled(path, *FSDP, budget("100 MiB"), machine=GPU, memory_model=Noted())
    assert asked
    for one in asked:
        assert one.layout == evolve(
            one.layout, offload_activations=False, offload_blocks=0, fused_backward=False
        )
        assert all(part.quantize == "none" for part in one.model.components if part.trained)


ZERO = ("launch.devices=2", 'launch.strategy="deepspeed"')


def test_deepspeed_as_the_recipe_asks(full: Path) -> None:
    given = (*ZERO, 'precision.trained="fp32"')
    found = compiled(full, *given, machine=GPU).plan
    assert found is not None and found.sharing == Sharing(strategy="deepspeed", stage=2)
    asked = ("launch.deepspeed={stage=3, offload_optimizer=true}",)
    found = compiled(full, *given, *asked, machine=GPU).plan
    assert found is not None
    assert found.sharing == Sharing(strategy="deepspeed", stage=3, offload_optimizer=True)
    lacking = evolve(GPU, missing=("deepspeed",))
    (warning,) = compiled(full, *given, machine=lacking).diagnostics
    assert (warning.code, warning.path) == ("missing-package", "launch.strategy")
    assert 'pip install "tuner[deepspeed]"' in warning.help


UNFIT = {
    'train.optimizer.name="adafactor"': "train.optimizer.name",
    'train.optimizer.name="adamw-schedulefree"': "train.optimizer.name",
    "train.ema={decay=0.9}": "train.ema",
    'precision.trained="bf16"': "precision.trained",
    'speed.compile="regional"': "speed.compile",
    "memory.offload={activations=true}": "memory.offload.activations",
}


@pytest.mark.parametrize(("override", "path"), UNFIT.items())
def test_what_deepspeed_cant_do_is_refused_by_name(full: Path, override: str, path: str) -> None:
    trained = () if "trained" in override else ('precision.trained="fp32"',)
    found = compiled(full, *ZERO, *trained, override, machine=GPU)
    (fault,) = (f for f in found.diagnostics if f.code == "not-sharded")
    assert fault.path == path and '"deepspeed"' in fault.message


def test_stage_3_gathers_lora_only(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + ADAPTER)
    for stage, refused in ((2, False), (3, True)):
        given = (*ZERO, f"launch.deepspeed.stage={stage}", 'adapter.kind="dora"')
        found = compiled(path, *given, 'precision.trained="fp32"', machine=GPU)
        assert [f.path for f in found.diagnostics if f.code == "not-sharded"] == (
            ["adapter.kind"] if refused else []
        )


def test_deepspeeds_keys_are_its_own(full: Path) -> None:
    cases = (
        ("launch.deepspeed.stage", "launch.devices=1", "launch.deepspeed.stage=2"),
        (
            "launch.deepspeed.offload_optimizer",
            "launch.devices=2",
            'launch.strategy="fsdp"',
            "launch.deepspeed.offload_optimizer=true",
        ),
        (
            "launch.deepspeed.offload_optimizer",
            *ZERO,
            'launch.device="cpu"',
            'precision.trained="fp32"',
            "launch.deepspeed.offload_optimizer=true",
        ),
        (
            "launch.reshard_after_forward",
            *ZERO,
            'precision.trained="fp32"',
            "launch.reshard_after_forward=true",
        ),
    )
    for path, *overrides in cases:
        faults = [f for f in compiled(full, *overrides).diagnostics if f.code != "missing-package"]
        assert [(f.code, f.path) for f in faults] == [("no-effect", path)]


def test_whole_models_that_dont_fit_are_told_of_shares(full: Path) -> None:
    given = ("launch.devices=2", 'launch.strategy="ddp"')
    found = compiled(full, *given, budget("600 MiB"), machine=GPU, memory_model=Shared())
    (fault,) = (f for f in found.diagnostics if f.code == "does-not-fit")
    assert 'strategy = "fsdp" in [launch] would fit' in fault.help
    muon = 'train.optimizer.name="muon"'
    found = compiled(full, *given, muon, budget("600 MiB"), machine=GPU, memory_model=Shared())
    (fault,) = (f for f in found.diagnostics if f.code == "does-not-fit")
    assert "fsdp" not in fault.help


def test_deepspeed_s_state_may_wait_on_the_host(full: Path) -> None:
    class Dealt(Shared):
        """600 MiB of state wait there."""

        def simulate(self, candidate: Candidate) -> Simulation:
            found = super().simulate(candidate)
            size = 400 * MIB if candidate.sharing.offload_optimizer else 1000 * MIB
            return evolve(found, phases=(evolve(found.phases[0], device_bytes=size),))

    given = (*ZERO, 'precision.trained="fp32"')
    for size, fits in (("500 MiB", True), ("300 MiB", False)):
        stated = () if fits else ("launch.deepspeed.offload_optimizer=true",)
        found = compiled(full, *given, *stated, budget(size), machine=GPU, memory_model=Dealt())
        (fault,) = (f for f in found.diagnostics if f.code == "does-not-fit")
        words = "offload_optimizer = true in [launch.deepspeed] would fit: 400 MiB"
        assert (fault.help == words) is fits and ("offload_optimizer" in fault.help) is fits
