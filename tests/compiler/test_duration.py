"""How long a plan says it takes, where nothing was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from compiler import costs
from compiler.devices import peak_flops
from compiler.memory import Candidate, Simulation
from compiler.plan import Plan
from tests.compiler.recipes import GPU, RECIPE, FixedMemory, compiled, project
from tests.compiler.test_ladder import OPEN, Formula

CARD = evolve(GPU, device_name="NVIDIA GeForce RTX 4090")
PEAK = peak_flops(CARD.device_name, "bfloat16") or 0.0


class Light(Formula):
    """Of so few operations that reading the weights takes longer."""

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`."""
        found = super().simulate(candidate)
        return evolve(found, flops=found.flops // 1000)


def seconds(folder: Path, budget: str, model: Formula) -> tuple[Plan, float]:
    """A plan with all settings open, and the time of all its steps."""
    recipe = folder / "recipe.toml"
    if not recipe.exists():
        project(folder, RECIPE.replace("batch_size = 2", "batch_size = 4") + OPEN)
    found = compiled(recipe, f'memory.budget="{budget}"', machine=CARD, memory_model=model)
    assert found.plan is not None and found.outlook is not None, found.diagnostics
    assert found.outlook.duration is not None
    return found.plan, found.outlook.duration.train_seconds


@pytest.mark.parametrize("budget", ["1100 MiB", "600 MiB", "290 MiB", "160 MiB"])
@pytest.mark.parametrize("model", [Formula(), Light()], ids=["heavy", "light"])
def test_a_step_takes_as_long_as_the_ladder_says(
    tmp_path: Path, budget: str, model: Formula
) -> None:
    free, least = seconds(tmp_path, "4 GiB", model)
    plan, found = seconds(tmp_path, budget, model)
    (rung,) = [rung for rung in plan.memory.ladder if rung.chosen]
    assert found / least == pytest.approx(rung.relative_time, rel=0.01)
    alone = costs.train_flops(free) / (0.35 * PEAK)
    assert least == pytest.approx(alone * free.memory.overhead)
    # 1e9 weights of 16 bits are read twice, 200 operations' time for each byte.
    more = 0.35 * 4e9 * 200 / free.memory.counts["flops"]
    assert free.memory.overhead == pytest.approx(1 + more, abs=1e-3)
    told = compiled(
        tmp_path / "recipe.toml", f'memory.budget="{budget}"', machine=CARD, memory_model=model
    )
    assert told.outlook is not None and told.outlook.duration is not None
    noted = f"{plan.memory.overhead:.3g} times as long with all that is moved"
    assert (noted in told.outlook.duration.why) is (plan.memory.overhead >= 1.05)


def test_of_a_device_that_is_not_known_nothing_is_modelled(tmp_path: Path) -> None:
    found = compiled(project(tmp_path), machine=GPU, memory_model=Formula())
    assert found.plan is not None and found.plan.memory.overhead == 1.0
    found = compiled(tmp_path / "recipe.toml", memory_model=Formula())  # on the processor
    assert found.plan is not None and found.plan.memory.overhead == 1.0


@pytest.mark.parametrize(
    ("family", "base", "passes"),
    [
        ("flux", "black-forest-labs/FLUX.1-dev", 1),  # told its guidance
        ("flux", "black-forest-labs/FLUX.1-schnell", 2),  # would be drawn with and without a prompt
        ("sd3", "stabilityai/stable-diffusion-3.5-medium", 2),
        ("flux2_dev", "black-forest-labs/FLUX.2-dev", 1),
    ],
)
def test_a_model_that_is_told_its_guidance_is_run_once_a_step(
    tmp_path: Path, family: str, base: str, passes: int
) -> None:
    text = RECIPE.replace('family = "sana"\nbase = "base"', f'family = "{family}"\nbase = "{base}"')
    text += '[validation]\nevery = "1 epoch"\nprompts = { a = "a dog" }\n[adapter]\nkind = "lora"\n'
    path = project(tmp_path, text)
    flops = []
    for guidance in (1.0, 3.5):
        found = compiled(
            path, f"validation.guidance={guidance}", machine=CARD, memory_model=FixedMemory()
        )
        assert found.plan is not None, found.diagnostics
        flops.append(costs.validate_flops(found.plan))
    assert flops[1] == pytest.approx(passes * flops[0]) and flops[0] > 0


def test_several_devices_share_the_samples(tmp_path: Path) -> None:
    """As many samples in a step of four as in four steps of one: each takes as long."""
    path = project(tmp_path, RECIPE.replace("batch_size = 2", "batch_size = 1"))
    found = {
        count: compiled(path, f"launch.devices={count}", machine=CARD, memory_model=Formula())
        for count in (1, 4)
    }
    plans = {count: each.plan for count, each in found.items()}
    times = {c: each.outlook and each.outlook.duration for c, each in found.items()}
    one, four = plans[1], plans[4]
    assert one is not None and four is not None and times[1] and times[4]
    assert one.steps.epochs == four.steps.epochs
    whole = times[4].train_seconds * 4 / times[1].train_seconds
    assert whole == pytest.approx(1, rel=0.01)
    assert times[4].flops_per_second == times[1].flops_per_second
    assert costs.step_key(four, "a card") != costs.step_key(one, "a card")
