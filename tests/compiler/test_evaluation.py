"""What the plan says of the loss on held-out images."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from compiler import costs
from compiler.compile import Compiled
from compiler.data.manifest import Manifest
from compiler.data.prompts import prompts_of
from compiler.occasions import evaluation_steps
from compiler.plan import HeldOut, alters_trajectory
from tests.compiler.recipes import RECIPE, FixedMemory, codes, compiled, make_pictures, project
from tuner.plan_view import text

HOLDOUT = RECIPE.replace('path = "pictures"', 'path = "pictures"\nholdout = 2')


def _compiled(path: Path, *overrides: str) -> Compiled:
    return compiled(path, *overrides, memory_model=FixedMemory())


def test_held_out_images_are_listed_and_judged_every_epoch(tmp_path: Path) -> None:
    result = _compiled(project(tmp_path, HOLDOUT))
    plan, manifest = result.plan, result.manifest
    assert plan is not None and manifest is not None and codes(result) == []
    judged = manifest.held_out
    assert judged is not None and (len(manifest), len(judged)) == (3, 2)
    assert not {sample.key for sample in manifest} & {sample.key for sample in judged}
    facts = plan.evaluation
    assert facts is not None and facts.manifest == judged.digest
    assert facts.groups == (
        HeldOut(source="pictures", width=64, height=64, images=2, batch_size=2),
    )
    assert (facts.every, facts.weights) == (plan.steps.per_epoch, "trained")
    assert list(evaluation_steps(plan)) == [0, 2, 4]


def test_it_alters_no_training(tmp_path: Path) -> None:
    path = project(tmp_path, HOLDOUT)
    on, off = _compiled(path).plan, _compiled(path, "evaluation.every=off").plan
    assert on is not None and off is not None and off.evaluation is None
    assert on.manifest == off.manifest and on.digest != off.digest
    assert evolve(on, evaluation=None).digest == off.digest
    assert not alters_trajectory("evaluation.every")


def test_mirrored_and_several_resolutions(tmp_path: Path) -> None:
    """Held-out images are judged at each resolution, and not mirrored."""
    result = _compiled(project(tmp_path, HOLDOUT), "data.flip=true", "data.resolution=[64, 128]")
    assert result.plan is not None and result.plan.evaluation is not None
    found = [(each.source, each.images) for each in result.plan.evaluation.groups]
    assert found == [("pictures@64", 2), ("pictures@128", 2)]


OWN = '[[data.source]]\npath = "judged"\nholdout = "all"\n'
SAID = 'captions = { from = "instance", prompt = "a photo of sks dog" }\n'


def _with_own(folder: Path, more: str = SAID) -> Path:
    """A recipe with a source of its own to be judged by."""
    path = project(folder, RECIPE)
    make_pictures(folder / "judged", [(64, 64)] * 3 + [(128, 64)])
    path.write_text(path.read_text().replace("[train]", f"{OWN}{more}\n[train]"))
    return path


def test_a_source_of_its_own_to_be_judged_by(tmp_path: Path) -> None:
    result = _compiled(_with_own(tmp_path))
    plan, manifest = result.plan, result.manifest
    assert plan is not None and manifest is not None and codes(result) == []
    assert [(s.id, s.images, s.held_out) for s in plan.sources] == [
        ("pictures", 5, 0),
        ("judged", 0, 4),
    ]
    assert {bucket.source for bucket in plan.buckets} == {"pictures"}
    assert {sample.source for sample in manifest} == {0} and manifest.held_out is not None
    assert plan.evaluation is not None
    assert [(g.source, g.width, g.images, g.batch_size) for g in plan.evaluation.groups] == [
        ("judged", 64, 3, 2),
        ("judged", 88, 1, 2),
    ]
    shown = " ".join(text(plan, recipe="r.toml", verbose=True).split())
    assert "4 held out" in shown and "5 images in 1 bucket" in shown


def test_what_it_is_judged_by_may_be_named_first_and_be_of_another_size(tmp_path: Path) -> None:
    """It takes part in no stage and no balance, and only its batch size must be told."""
    first = OWN + SAID + "resolution = 128\n"
    path = project(tmp_path, RECIPE.replace("[[data.source]]", f"{first}[[data.source]]", 1))
    make_pictures(tmp_path / "judged", [(128, 128)] * 3)
    make_pictures(tmp_path / "more", [(64, 64)] * 10)
    lines = path.read_text().replace('path = "pictures"', 'path = "pictures"\nweight = 1')
    more = f'[[data.source]]\npath = "more"\nweight = 1\nuntil = "1 epoch"\n{SAID}'
    path.write_text(lines.replace("[train]", f"{more}[train]"))
    result = _compiled(path)
    plan = result.plan
    assert plan is not None, result.diagnostics
    assert [(s.id, s.repeats) for s in plan.sources] == [
        ("judged", "1"),
        ("pictures", "2"),
        ("more", "1"),
    ]
    assert [stage.sources for stage in plan.steps.stages] == [("pictures", "more"), ("pictures",)]
    table = _compiled(path, "train.batch_size={ 64 = 2 }")
    assert codes(table) == ["missing-key"] and "128" in table.diagnostics[0].message
    table = _compiled(path, "train.batch_size={ 64 = 2, 128 = 1 }")
    assert table.plan is not None and table.plan.evaluation is not None
    assert [g.batch_size for g in table.plan.evaluation.groups] == [1]


@pytest.mark.parametrize(
    ("more", "override", "code", "words"),
    [
        ("repeats = 2", "", "no-effect", "`repeats` has no effect: all of this source is held"),
        ('until = "1 epoch"', "", "no-effect", "`until` has no effect"),
        ("regularisation = {}", "", "no-effect", "`regularisation` has no effect"),
        ("", "evaluation.every=off", "no-effect", "no evaluation loss is measured"),
        ("", 'data.source[0].holdout="all"', "holdout-too-large", "of all sources are held out"),
    ],
)
def test_what_an_untrained_source_can_not_be_told(
    tmp_path: Path, more: str, override: str, code: str, words: str
) -> None:
    result = _compiled(_with_own(tmp_path, SAID + more), *([override] if override else []))
    assert result.plan is None and set(codes(result)) == {code}
    assert words in result.diagnostics[0].message


def test_what_is_judged_is_not_trained_by_another_source(tmp_path: Path) -> None:
    path = _with_own(tmp_path)
    path.write_text(path.read_text().replace('path = "judged"', 'path = "pictures/../pictures"'))
    fault = _compiled(path).diagnostics[0]
    assert fault.code == "holdout-leak" and fault.help.startswith("take them out of one of the two")


def test_captions_of_held_out_images_are_encoded_too(tmp_path: Path) -> None:
    recipe = HOLDOUT.replace(
        'captions = { from = "instance", prompt = "a photo of sks dog" }', ""
    ).replace("holdout = 2", "holdout = 3")
    path = project(tmp_path, recipe)
    for picture in make_pictures(tmp_path / "pictures", [(64, 64)] * 5).glob("*.png"):
        picture.with_suffix(".txt").write_text(f"picture {picture.stem}")
    result = _compiled(path)
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    texts = {prompt.text for prompt in prompts_of(result.plan, result.manifest)}
    assert texts >= {f"picture {number:03}" for number in range(5)}
    assert len(result.manifest.captions) == 2


def test_the_cache_and_the_time_are_counted(tmp_path: Path) -> None:
    path = project(tmp_path, HOLDOUT)
    on, off = _compiled(path).plan, _compiled(path, "evaluation.every=off").plan
    assert on is not None and off is not None
    one = costs.latents_bytes(off) / 3
    assert costs.latents_bytes(on) - costs.latents_bytes(off) == 2 * one
    # three times, two images at five levels, a forward pass of one of the step's two samples each
    passes = 3 * 2 * 5
    per_sample = on.memory.counts["flops"] / 2 * costs.forward_share(on)
    found = costs.validate_flops(on) - costs.validate_flops(off)
    assert found == pytest.approx(passes * per_sample)


def test_the_list_survives_a_file(tmp_path: Path) -> None:
    result = _compiled(project(tmp_path, HOLDOUT))
    assert result.manifest is not None and result.manifest.held_out is not None
    result.manifest.save(tmp_path / "list")
    again = Manifest.load(tmp_path / "list")
    assert again.digest == result.manifest.digest and again.held_out is not None
    assert list(again.held_out) == list(result.manifest.held_out)
    off = _compiled(project(tmp_path / "off", HOLDOUT), "evaluation.every=off").manifest
    assert off is not None and off.held_out is None
    off.save(tmp_path / "list")
    assert Manifest.load(tmp_path / "list").held_out is None


def test_the_average_is_judged_where_there_is_one(tmp_path: Path) -> None:
    path = project(tmp_path, HOLDOUT + "[train.ema]\ndecay = 0.9\n")
    for setting, weights in (
        ("seed=0", "average"),
        ("evaluation.weights=trained", "trained"),
        ("evaluation.weights=average", "average"),
    ):
        plan = _compiled(path, setting).plan
        assert plan is not None and plan.evaluation is not None
        assert plan.evaluation.weights == weights


def test_pictures_are_drawn_with_the_average_unless_told_otherwise(tmp_path: Path) -> None:
    pictures = '[validation]\nprompts = { dog = "a dog" }\n'
    path = project(tmp_path, f"{RECIPE}\n[train.ema]\ndecay = 0.9\n{pictures}")
    for setting, weights in (
        ("seed=0", "average"),
        ("validation.weights=trained", "trained"),
        ("validation.weights=average", "average"),
    ):
        plan = _compiled(path, setting).plan
        assert plan is not None and plan.validation.weights == weights
        shown = " ".join(text(plan, recipe="r.toml").split())
        assert ("not by the average" in shown) == (weights == "trained")
    path = project(tmp_path / "none", f"{RECIPE}\n{pictures}")
    plan = _compiled(path, "validation.weights=trained").plan
    assert plan is not None and plan.validation.weights is None
    refused = _compiled(path, "validation.weights=average")
    assert refused.plan is None and codes(refused) == ["no-effect"]
    assert refused.diagnostics[0].path == "validation.weights"


@pytest.mark.parametrize(
    ("recipe", "setting", "code"),
    [
        (RECIPE, "evaluation.every=1 epoch", "no-effect"),  # nothing is held out
        (RECIPE, "evaluation.timesteps=[0.5]", "no-effect"),
        (HOLDOUT, 'evaluation={ every = "off", timesteps = [0.5] }', "no-effect"),
        (HOLDOUT, "evaluation.weights=average", "no-effect"),  # no average is kept
        (HOLDOUT, "evaluation.every=10 min", "bad-unit"),
        (HOLDOUT, "evaluation.timesteps=[0.5, 0.5]", "duplicate-id"),
        (HOLDOUT, "evaluation.timesteps=[0.5, 1.0]", "out-of-range"),
    ],
)
def test_what_is_refused(tmp_path: Path, recipe: str, setting: str, code: str) -> None:
    result = _compiled(project(tmp_path, recipe), setting)
    assert result.plan is None and codes(result) == [code]


def test_off_without_anything_held_out_is_fine(tmp_path: Path) -> None:
    assert codes(_compiled(project(tmp_path), "evaluation.every=off")) == []
