"""Distillation in the plan: its defaults, what it refuses, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiler.families.sana import CARD
from compiler.passes.sprint import HEADS
from compiler.plan import Plan, Sprint
from compiler.schema import SprintRecipe
from compiler.synonyms import SYNONYMS
from tests.compiler.recipes import RECIPE, FixedMemory, codes, compiled, project

SPRINT = RECIPE + "[sprint]\n"


def plan_of(path: Path, *overrides: str) -> Plan:
    result = compiled(path, *overrides)
    assert result.plan is not None, result.diagnostics
    return result.plan


def sprint_of(path: Path, *overrides: str) -> Sprint:
    found = plan_of(path, *overrides).sprint
    assert found is not None
    return found


def teacher(path: Path, **changes: object) -> Path:
    """The project's base as a teacher of other settings."""
    file = path.parent / "base" / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


def test_defaults_are_the_script_s(tmp_path: Path) -> None:
    found = sprint_of(teacher(project(tmp_path, SPRINT), timestep_scale=0.001))
    assert (found.sigma_data, found.guidance) == (0.5, (4.0, 4.5, 5.0))
    assert (found.mean, found.std) == (0.2, 1.6)
    assert (found.discriminator_mean, found.discriminator_std) == (-0.6, 1.0)
    assert (found.consistency_weight, found.adversarial_weight) == (1.0, 0.5)
    assert (found.tangent_warmup, found.guidance_embeds_scale) == (4000, 0.1)
    assert (found.largest_angle, found.largest_share) == (1.5708, 0.0)
    assert not found.misaligned_pairs and found.teacher_time == 1.0
    assert found.discriminator.lr == plan_of(tmp_path / "recipe.toml").optimizer.lr
    assert plan_of(tmp_path / "recipe.toml").max_grad_norm == 0.1
    assert plan_of(tmp_path / "recipe.toml", "train.max_grad_norm=0.5").max_grad_norm == 0.5


@pytest.mark.parametrize(
    ("depth", "heads"), [(20, (2, 8, 14, 19)), (28, (2, 8, 14, 20, 27)), (6, (1, 2, 4, 5))]
)
def test_heads_follow_the_depth(tmp_path: Path, depth: int, heads: tuple[int, ...]) -> None:
    path = teacher(project(tmp_path, SPRINT), num_layers=depth)
    assert sprint_of(path).heads == heads


def test_the_largest_angle_has_its_own_switch(tmp_path: Path) -> None:
    path = project(tmp_path, SPRINT)
    assert sprint_of(path, "sprint.train_largest_timestep=true").largest_share == 0.5
    assert "no-effect" in codes(compiled(path, "sprint.largest_timestep_prob=0.2"))


def test_without_a_discriminator(tmp_path: Path) -> None:
    path = project(tmp_path, SPRINT)
    assert sprint_of(path, "sprint.adversarial_weight=0").heads == ()
    refused = compiled(path, "sprint.adversarial_weight=0", "sprint.heads=[1]")
    assert "no-effect" in codes(refused)


def test_heads_beyond_the_depth_are_refused(tmp_path: Path) -> None:
    """Where the script drops them without a word."""
    result = compiled(teacher(project(tmp_path, SPRINT), num_layers=6), "sprint.heads=[2, 8]")
    (fault,) = [f for f in result.diagnostics if f.severity == "error"]
    assert (fault.code, fault.path) == ("out-of-range", "sprint.heads[1]")
    assert "duplicate-id" in codes(compiled(tmp_path / "recipe.toml", "sprint.heads=[2, 2]"))


def test_an_ordinary_base_has_its_times_fitted(tmp_path: Path) -> None:
    path = project(tmp_path, SPRINT)
    assert codes(compiled(path)) == ["fitted-times"]
    assert sprint_of(path).teacher_time == 1000.0


@pytest.mark.parametrize(
    "override",
    [
        'adapter.kind="lora"',
        'model.transformer.init="random"',
        'precision.compute="fp16"',
        'speed.compile="regional"',
        "memory.micro_batch=1",
        "memory.offload.activations=true",
        "launch.devices=2",
        "data.source.0.holdout=0.4",
    ],
)
def test_what_does_not_go_with_it(tmp_path: Path, override: str) -> None:
    faults = compiled(project(tmp_path, SPRINT), override).diagnostics
    assert any(f.code == "conflict" and "[sprint]" in f.message for f in faults), faults


def test_what_has_no_effect_under_it(tmp_path: Path) -> None:
    for override in ("train.timesteps.shift=3.0", 'train.loss.kind="huber"'):
        assert "no-effect" in codes(compiled(project(tmp_path / override[6:9], SPRINT), override))
    path = project(tmp_path / "pairs", SPRINT)
    alone = compiled(path, "sprint.misaligned_pairs=true", "train.batch_size=1")
    assert "no-effect" in codes(alone)
    assert codes(compiled(path, "sprint.misaligned_pairs=true")) == ["fitted-times"]
    assert "long-warmup" in codes(compiled(path, "sprint.tangent_warmup=5000"))
    judged = compiled(path, "sprint.adversarial_weight=0", "sprint.discriminator_lr=1e-5")
    assert [f.path for f in judged.diagnostics if f.code == "no-effect"] == [
        "sprint.discriminator_lr"
    ]
    nothing = compiled(path, "sprint.adversarial_weight=0", "sprint.consistency_weight=0")
    assert "conflict" in codes(nothing)
    prompts = 'validation.prompts={ a = "a dog" }'
    assert "not-in-family" in codes(compiled(path, prompts, 'validation.scheduler="euler"'))


def test_other_families_can_t(tmp_path: Path) -> None:
    result = compiled(project(tmp_path, SPRINT.replace('"sana"', '"sd3"'), "sd3"))
    assert "not-in-family" in codes(result)


def test_a_student_is_no_teacher(tmp_path: Path) -> None:
    path = teacher(project(tmp_path, SPRINT), guidance_embeds=True)
    assert "conflict" in codes(compiled(path))


def test_the_ladder_leaves_batches_and_sides_alone(tmp_path: Path) -> None:
    """Smaller batches would change the discriminator's norms; other rungs have two networks."""
    memory = FixedMemory()
    compiled(project(tmp_path, SPRINT), 'memory.budget="1 GiB"', memory_model=memory)
    assert {asked.micro_batch for asked in memory.asked} == {0}
    assert not any(asked.layout.fused_backward for asked in memory.asked)
    assert all(asked.sprint is not None for asked in memory.asked)


def test_the_script_s_names_lead_here() -> None:
    names = {key: to for key, to in SYNONYMS.items() if to.startswith("sprint.")}
    keys = {field.name for field in SprintRecipe.__attrs_attrs__}  # type: ignore[attr-defined]
    assert {to.partition(".")[2] for to in names.values()} <= keys
    assert names["scm_cfg_scale"] == "sprint.guidance"


def test_published_teachers_are_known() -> None:
    found = [known for known in CARD.known if "teacher" in known.base]
    assert len(found) == 2
    for known in found:
        transformer = known.configs["transformer"]
        assert transformer["timestep_scale"] == 0.001
        assert transformer["qk_norm"] == "rms_norm_across_heads"
        assert transformer["num_layers"] in HEADS
