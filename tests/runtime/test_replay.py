"""The reference scripts' recorded runs, reproduced by our step and optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from tests.runtime.replay import load_trace, replay, settings_of_script, windows


@pytest.mark.parametrize("name", ["sd3", "sana"])
def test_recorded_lora_runs_are_reproduced(name: str, data_root: Path) -> None:
    folder = data_root / "oracle"
    trace = load_trace(folder / f"{name}-lora.trace.pt")
    settings = settings_of_script(trace["settings"], trace["steps"])
    replayed = replay(trace, folder / f"tiny-{name}", settings)
    assert len(replayed.steps) == 10
    for step in replayed.steps:
        assert step.loss == pytest.approx(step.loss_theirs, rel=1e-6)
        assert step.grad_norm == pytest.approx(step.grad_norm_theirs, rel=1e-6)
        assert step.input_difference == 0.0
        assert step.output_difference < 1e-5  # processors round differently
    assert len(replayed.weights) in (46, 48)
    # A thousandth of what one step at this rate moves a weight by.
    assert replayed.worst_weight(atol=1e-3 * settings.lr) < 1e-6


def test_a_wrong_objective_is_noticed(data_root: Path) -> None:
    """Or the comparison above means nothing. Shift 1 is what stock Sana scripts silently do."""
    folder = data_root / "oracle"
    trace = load_trace(folder / "sana-lora.trace.pt")
    settings = settings_of_script(trace["settings"], trace["steps"])
    settings = evolve(settings, objective=evolve(settings.objective, shift=1.0))
    replayed = replay(trace, folder / "tiny-sana", settings)
    assert replayed.steps[0].input_difference > 1e-3
    assert replayed.worst_weight() > 1e-3


def test_micro_batches_are_grouped_by_update() -> None:
    def record(norms: int) -> dict[str, list[int]]:
        return {"grad_norm": [0] * norms}

    assert [len(w) for w in windows([record(0), record(1), record(1)], 2)] == [2, 1]
