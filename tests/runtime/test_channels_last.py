"""A UNet whose channels lie side by side: the same formulas, simulated, saved and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from compiler.plan import Speed
from runtime.events import Silent
from runtime.execute import execute
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.step import run_step
from runtime.memory.tracker import Tracker
from tests.compiler.recipes import MACHINE, compiled, make_pictures
from tests.runtime.memory_cases import small
from tests.runtime.tiny import make_tiny
from tests.test_matrix import CASES, RECIPE, KillAfter, Killed, weights

CPU = torch.device("cpu")


@pytest.mark.parametrize(("rank", "checkpointing"), [(4, 1), (0, 0)])
def test_memory_is_simulated_as_it_is(rank: int, checkpointing: int) -> None:
    step = evolve(small("sd", rank=rank, checkpointing=checkpointing), channels_last=True)
    simulated = RuntimeMemoryModel().course(step, step.shapes[0])
    measured = run_step(step, step.shapes[0], CPU, Tracker({"cpu"}))
    assert simulated.peak == measured.peak
    assert simulated.load == measured.load


@pytest.mark.parametrize("case", ["lora", "full"])
def test_a_run_goes_on_and_learns_the_same(case: str, tmp_path: Path) -> None:
    make_tiny("sd", tmp_path / "base")
    make_pictures(tmp_path / "pictures", [(64, 64), (80, 64), (64, 96)])
    adapter, compute, checkpointing = CASES[case]

    def run(name: str, *kill: int, **speed: Any) -> dict[str, torch.Tensor]:
        text = RECIPE.format(
            name=name,
            family="sd",
            adapter=adapter,
            compute=compute,
            checkpointing=checkpointing,
            drawing="steps = 2",
        )
        (tmp_path / "recipe.toml").write_text(text)
        result = compiled(tmp_path / "recipe.toml", machine=MACHINE)
        assert result.plan is not None and result.manifest is not None, result.diagnostics
        plan = evolve(result.plan, speed=Speed(**speed))
        for after in kill:
            with pytest.raises(Killed):
                execute(plan, result.manifest, KillAfter(after))
        assert execute(plan, result.manifest, Silent()).status == "finished"
        return weights(Path(plan.run_folder))

    whole = run("whole", channels_last=True)
    halted = run("halted", 2, channels_last=True)
    assert all(torch.equal(tensor, halted[name]) for name, tensor in whole.items())
    plain = run("plain")
    assert plain.keys() == whole.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-3, atol=3e-3)
    assert all(tensor.is_contiguous() for tensor in whole.values())
