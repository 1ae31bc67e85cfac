"""What the compiler makes of timesteps and loss, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiler.compile import Compiled
from compiler.noise import level, shift_of, trained_entries
from compiler.plan import Objective
from tests.compiler.recipes import RECIPE, FixedMemory, codes, compiled, project


def _compiled(path: Path, *overrides: str) -> Compiled:
    return compiled(path, *overrides, memory_model=FixedMemory())


def _objective(path: Path, *overrides: str) -> Objective:
    result = _compiled(path, *overrides)
    assert result.plan is not None, result.diagnostics
    return result.plan.objective


def _sd3(folder: Path, **scheduler: object) -> Path:
    path = project(folder, RECIPE.replace('"sana"', '"sd3"'), family="sd3")
    place = folder / "base" / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **scheduler}))
    return path


def test_everything_reaches_the_plan(tmp_path: Path) -> None:
    found = _objective(
        project(tmp_path),
        'train.timesteps={ sampling = "beta", alpha = 3, beta = 1.5, min = 0.1, max = 0.9, '
        "stratified = true }",
        'train.loss={ kind = "huber", delta = 0.2, schedule = "snr" }',
    )
    assert (found.sampling, found.alpha, found.beta) == ("beta", 3.0, 1.5)
    assert (found.min_sigma, found.max_sigma, found.stratified) == (0.1, 0.9, True)
    assert (found.loss, found.delta, found.delta_schedule) == ("huber", 0.2, "snr")
    assert found.shift == 3.0 and found.shift_by_size is None


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ("train.timesteps.alpha=3.0", "no-effect"),
        ("train.loss.delta=0.2", "no-effect"),
        ('train.loss.schedule="snr"', "no-effect"),
        ('train.loss={ kind = "huber", delta = 2.0, schedule = "snr" }', "out-of-range"),
        ("train.timesteps={ min = 0.6, max = 0.4 }", "out-of-range"),
        ("train.timesteps={ min = 0.5, max = 0.5 }", "out-of-range"),
        ("train.timesteps.max=0.001", "out-of-range"),
        ("train.timesteps.mode_scale=3.0", "out-of-range"),
        ('train.loss.weighting="min-snr"', "not-in-family"),
        ('train.timesteps.shift="resolution"', "not-in-family"),  # Sana
    ],
)
def test_what_is_refused(tmp_path: Path, setting: str, code: str) -> None:
    result = _compiled(project(tmp_path), setting)
    assert result.plan is None and codes(result) == [code]


def test_a_narrow_range_that_holds_one_entry_is_fine(tmp_path: Path) -> None:
    found = _objective(project(tmp_path), "train.timesteps={ min = 0.7499, max = 0.7501 }")
    assert trained_entries(found, found.shift) == (500, 500)
    assert level(500, 3.0) == 0.75


def test_shift_by_resolution_is_warned_of_where_the_base_samples_otherwise(tmp_path: Path) -> None:
    result = _compiled(_sd3(tmp_path), 'train.timesteps.shift="resolution"')
    assert result.plan is not None and codes(result) == ["shift-differs"]
    rule = result.plan.objective.shift_by_size
    assert rule is not None and result.plan.objective.shift == 0.0
    assert (rule.patch, rule.base_shift, rule.max_shift) == (2, 0.5, 1.16)
    assert (rule.base_tokens, rule.max_tokens, rule.kind) == (256, 4096, "exponential")


def test_a_base_that_samples_by_resolution_is_trained_so(tmp_path: Path) -> None:
    path = _sd3(tmp_path, use_dynamic_shifting=True, max_shift=1.3, time_shift_type="linear")
    result = _compiled(path)
    assert result.plan is not None and codes(result) == []
    found = result.plan.objective
    assert found.shift_by_size is not None
    assert (found.shift_by_size.max_shift, found.shift_by_size.kind) == (1.3, "linear")
    assert shift_of(found, 128, 128) == pytest.approx(1.3)  # 4096 tokens
    assert codes(_compiled(path, "train.timesteps.shift=3.0")) == ["shift-differs"]


def test_wrong_bounds_have_no_echo(tmp_path: Path) -> None:
    assert codes(_compiled(project(tmp_path), "train.timesteps.min=-0.1")) == ["out-of-range"]
