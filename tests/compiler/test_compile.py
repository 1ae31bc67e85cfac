"""Recipe to plan: what is resolved, what is refused, and that nothing is written."""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.diagnostics import Diagnostic, render
from compiler.lock import LockError, differences, dumps, loads
from compiler.plan import Plan, digest_of, plain
from tests.compiler.recipes import (
    GIB,
    GPU,
    RECIPE,
    FixedMemory,
    codes,
    compiled,
    make_pictures,
    project,
)


def plan_of(path: Path, *overrides: str, **rest: object) -> Plan:
    result = compiled(path, *overrides, **rest)  # type: ignore[arg-type]
    assert result.plan is not None, [f.message for f in result.diagnostics]
    return result.plan


def refusal(path: Path, *overrides: str, **rest: object) -> Diagnostic:
    """The one error of a recipe that is refused."""
    result = compiled(path, *overrides, **rest)  # type: ignore[arg-type]
    errors = [fault for fault in result.diagnostics if fault.severity == "error"]
    assert result.plan is None and result.manifest is None
    assert len(errors) == 1, [fault.message for fault in errors]
    return errors[0]


def decision(plan: Plan, key: str) -> tuple[str, str]:
    found = [(d.value, d.source) for d in plan.decisions if d.key == key]
    assert found, key
    return found[-1]


def test_everything_is_resolved(tmp_path: Path) -> None:
    plan = plan_of(project(tmp_path))
    assert plan.steps.per_epoch == 3 and plan.steps.total == 6 and plan.steps.epochs == 2
    assert plan.run_folder == str(tmp_path / "runs" / "try")
    assert plan.model.base == str(tmp_path / "base")
    assert plan.precision.compute == "float32"
    assert plan.objective.shift == 3.0  # from the scheduler's `flow_shift`
    assert "auto" not in dumps(plan).replace("auto_", "").split('"')


def test_the_same_recipe_gives_the_same_digest_and_lock(tmp_path: Path) -> None:
    path = project(tmp_path)
    first, second = plan_of(path), plan_of(path)
    assert first == second and dumps(first) == dumps(second)
    assert loads(dumps(first)) == first
    other = plan_of(path, "seed=1")
    assert other.digest != first.digest
    assert [row[0] for row in differences(first, other)] == ["seed"]


def test_a_damaged_lock_is_refused(tmp_path: Path) -> None:
    text = dumps(plan_of(project(tmp_path)))
    for bad in ("format = 1", text.replace("format = 1", "format = 99"), text + "\nx = 1", "a = ["):
        with pytest.raises(LockError):
            loads(bad)


def test_where_each_value_came_from(tmp_path: Path) -> None:
    path = project(tmp_path)
    plan = plan_of(path, "train.batch_size=1")
    assert decision(plan, "train.batch_size") == ("1", "--set")
    assert decision(plan, "train.epochs")[1].endswith("recipe.toml:15")
    assert decision(plan, "train.timesteps.shift") == ("3", "the base's scheduler")
    assert decision(plan, "train.timesteps.sampling") == ("logit-normal", "family sana")


def test_compiling_writes_nothing(tmp_path: Path) -> None:
    path = project(tmp_path)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    plan_of(path)
    refusal(path, "train.batch_size=99")
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    groups=st.lists(
        st.tuples(st.sampled_from([(64, 64), (96, 64), (64, 128)]), st.integers(1, 6)),
        min_size=1,
        max_size=3,
        unique_by=lambda g: g[0],
    ),
    repeats=st.sampled_from(["1", "5", "0.5", "1.1", "2.34", "0.1"]),
    batch=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    epochs=st.integers(1, 3),
)
def test_steps_equal_a_brute_force_count(
    tmp_path_factory: pytest.TempPathFactory,
    groups: list[tuple[tuple[int, int], int]],
    repeats: str,
    batch: int,
    accumulate: int,
    epochs: int,
) -> None:
    folder = tmp_path_factory.mktemp("count")
    path = project(folder, RECIPE.replace('path = "pictures"', f'path = "p"\nrepeats = {repeats}'))
    make_pictures(folder / "p", [size for size, count in groups for _ in range(count)])
    result = compiled(
        path,
        f"train.batch_size={batch}",
        f"train.accumulate={accumulate}",
        f"train.epochs={epochs}",
    )
    images = sum(count for _, count in groups)
    if batch > math.ceil(images * Fraction(repeats)):
        assert codes(result)[-1:] == ["batch-too-large"]
        return
    assert result.plan is not None
    assert result.plan.steps.total == epochs * _count(groups, repeats, batch, accumulate)


def _count(
    groups: list[tuple[tuple[int, int], int]], repeats: str, batch: int, accumulate: int
) -> int:
    """Steps of one epoch, by handing out the samples one by one."""
    batches = 0
    for _, images in groups:
        left = images * Fraction(repeats)
        while left > 0:
            left -= batch
            batches += 1
    steps = 0
    while batches > 0:
        batches -= accumulate
        steps += 1
    return steps


def test_the_tutorial_has_11910_steps(tmp_path: Path) -> None:
    recipe = RECIPE.replace('path = "pictures"', 'path = "many"\nrepeats = 5')
    path = project(tmp_path, recipe)
    make_pictures(tmp_path / "many", [(64, 64)] * 476)
    plan = plan_of(path, "train.batch_size=6", "train.epochs=30")
    assert (plan.steps.samples_per_epoch, plan.steps.per_epoch) == (2380, 397)
    assert plan.steps.total == 11_910


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("train.batch_size=6", "batch-too-large", "batch_size = 5"),
        ("train.steps=5", "conflict", "leave one of them out"),
        ("model.family=sanna", "unknown-value", "did you mean `sana`?"),
        ("model.family=sd3", "wrong-family", 'say `family = "sana"`'),
        ("model.base=./nowhere", "missing-path", "Diffusers layout"),
        ("model.base=someone/something", "unknown-model", "hf download"),
        ("data.source.0.path=nowhere", "missing-path", "relative to the recipe"),
        ("train.optimizer.name=adamv", "unknown-value", "did you mean `adamw`?"),
        ("precision.compute=fp16", "fp16-overflow", "bf16"),
        ("train.schedule.warmup=99 steps", "schedule-too-long", "10%"),
        ("train.schedule.power=2", "no-effect", ""),
        ("train.timesteps.mode_scale=1.0", "no-effect", ""),
        ("validation.prompts={a='x'}\nvalidation.sizes=['65x64']", "bad-size", "64x64"),
        ("validation.prompts={'a b'='x'}", "bad-name", "letters"),
        ("checkpoints.every=30 min", "bad-unit", "steps or epochs"),
        ("data.multiple=20", "bad-multiple", "multiple = 16"),
        ("data.resolution=4", "out-of-range", "megapixels"),
        ("output=recipe.toml", "unwritable-output", ""),
        ("name=../evil", "bad-name", "letters"),
        ("extends=nothing.toml", "no-effect", "two lines"),
    ],
)
def test_what_is_refused(tmp_path: Path, override: str, code: str, words: str) -> None:
    fault = refusal(project(tmp_path), *override.split("\n"))
    assert fault.code == code
    assert words in fault.help
    assert fault.span is not None


def test_missing_captions(tmp_path: Path) -> None:
    recipe = RECIPE.replace('captions = { from = "instance", prompt = "a photo of sks dog" }', "")
    path = project(tmp_path, recipe)
    fault = refusal(path)
    assert fault.code == "missing-captions" and "write a .txt file" in fault.help
    (tmp_path / "pictures" / "000.txt").write_text("a plain picture")
    (tmp_path / "pictures" / "001.txt").write_text("  \n")  # an empty one counts as none
    result = compiled(path, "data.captions.missing=skip", "train.batch_size=1")
    assert result.plan is not None and result.plan.sources[0].images == 1
    assert result.plan.sources[0].skipped == 4


def test_all_mistakes_at_once_even_beside_wrong_types(tmp_path: Path) -> None:
    path = project(tmp_path)
    bad = RECIPE.replace("batch_size = 2", 'batch_size = "2"\nbatch = 3')
    path.write_text(
        bad.replace('"pictures"', '"nowhere"').replace("lr = 1e-4", "lr = 1e-4, eps = -1")
    )
    assert codes(compiled(path)) == ["missing-path", "wrong-type", "unknown-key", "out-of-range"]


def test_an_unwritable_output(tmp_path: Path) -> None:
    path = project(tmp_path)
    closed = tmp_path / "closed"
    closed.mkdir()
    os.chmod(closed, 0o555)
    try:
        assert refusal(path, "output=closed/runs").code == "unwritable-output"
    finally:
        os.chmod(closed, 0o755)


def test_a_broken_picture_among_good_ones(tmp_path: Path) -> None:
    path = project(tmp_path)
    (tmp_path / "pictures" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 not more than this")
    fault = refusal(path)
    assert fault.code == "broken-images" and "bad.jpg" in fault.notes[0]
    result = compiled(path, "data.broken=skip")
    assert result.plan is not None and codes(result) == ["broken-images"]
    assert result.plan.sources[0].skipped == 1 and result.plan.sources[0].images == 5


def test_an_empty_folder(tmp_path: Path) -> None:
    path = project(tmp_path)
    (tmp_path / "empty").mkdir()
    fault = refusal(path, "data.source.0.path=empty")
    assert fault.code == "no-images" and "the folder is empty" in fault.help


def test_sources_inherit_key_by_key(tmp_path: Path) -> None:
    recipe = RECIPE.replace(
        "resolution = 64", 'resolution = 64\ncaptions = { dropout = 0.25, missing = "skip" }'
    )
    captions = plan_of(project(tmp_path, recipe)).sources[0].captions
    assert (captions.kind, captions.dropout, captions.missing) == ("instance", 0.25, "skip")


def test_checkpointing_fits_the_budget(tmp_path: Path) -> None:
    path, model = project(tmp_path), FixedMemory()
    result = compiled(path, "memory.budget=5 GiB", memory_model=model)
    assert result.plan is not None
    assert result.plan.memory.layout.activation_checkpointing == 4  # 5 GiB: the first that fits
    tried = [c.layout.activation_checkpointing for c in model.asked]
    assert tried[0] == 0 and set(tried) <= {0, 4, 3, 2, 1}
    digests = {digest_of(plain(each)) for each in model.asked}
    assert len(digests) == len(model.asked) <= 7  # a few, with neighbours; none of them twice
    rungs = result.plan.memory.ladder
    assert [r.chosen for r in rungs].count(True) == 1
    chosen = next(n for n, rung in enumerate(rungs) if rung.chosen)
    assert [r.settings["memory.activation_checkpointing"] for r in rungs[chosen - 1 :][:3]] == [
        "off",
        "4",
        "3",
    ]
    assert [r.peak_bytes for r in rungs] == sorted((r.peak_bytes for r in rungs), reverse=True)
    assert result.plan.memory.phases[0].device_bytes == 5 * GIB
    roomy = compiled(path, "memory.budget=9 GiB", memory_model=FixedMemory())
    assert roomy.plan is not None and roomy.plan.memory.layout.activation_checkpointing == 0
    tight = compiled(path, "memory.budget=2 GiB", memory_model=FixedMemory())
    assert codes(tight) == ["does-not-fit"] and tight.plan is None


def test_precision_follows_the_device(tmp_path: Path) -> None:
    plan = plan_of(project(tmp_path), machine=GPU)
    assert (plan.device, plan.precision.compute, plan.precision.trained) == (
        "cuda",
        "bfloat16",
        "float32",
    )


def test_extends_holds_only_differences(tmp_path: Path) -> None:
    path = project(tmp_path)
    child = tmp_path / "child.toml"
    child.write_text('extends = "recipe.toml"\nname = "child"\n[train]\nepochs = 4\n')
    plan = plan_of(child)
    assert (plan.name, plan.steps.total) == ("child", 12)
    assert decision(plan, "train.epochs")[1].endswith("child.toml:4")
    assert decision(plan, "train.batch_size")[1] == "recipe.toml:16"
    path.write_text('extends = "child.toml"\n' + RECIPE)
    assert "extends-circle" in codes(compiled(child))


@pytest.mark.parametrize(
    ("parent", "code"),
    [
        ('"nothing.toml"', "missing-path"),
        ('"preset:nothing"', "unknown-preset"),
        ('"child.toml"', "extends-circle"),
        ("3", "wrong-type"),
    ],
)
def test_a_parent_that_is_not_there_is_all_that_is_said(
    tmp_path: Path, parent: str, code: str
) -> None:
    """What it would have held is not missed, key by key; other mistakes are told beside it."""
    child = tmp_path / "child.toml"
    child.write_text(f'extends = {parent}\nname = "child"\n')
    assert codes(compiled(child)) == [code]
    child.write_text(f'extends = {parent}\nname = "child"\nsead = 4\n')
    assert sorted(codes(compiled(child))) == sorted([code, "unknown-key"])


def test_presets_are_named_by_what_they_fit(tmp_path: Path) -> None:
    presets = tmp_path / "presets"
    presets.mkdir()
    (presets / "small.toml").write_text("[memory]\nactivation_checkpointing = 2\n")
    path = project(tmp_path, 'extends = "preset:small"\n' + RECIPE)
    plan = plan_of(path, presets=presets)
    assert plan.memory.layout.activation_checkpointing == 2
    path.write_text('extends = "preset:smal"\n' + RECIPE)
    wrong = refusal(path, presets=presets)
    assert wrong.help == "did you mean `preset:small`?"


def test_a_diagnostic_reads_well(tmp_path: Path) -> None:
    path = project(tmp_path)
    result = compiled(path, "train.batch_size=6")
    text = render(result.diagnostics[0], result.texts)
    assert text.splitlines() == [
        "error[batch-too-large]: a batch of 6 is larger than source `pictures`: 5 images",
        "  x 1 = 5 samples an epoch",
        " --> --set:1:18",
        "  |",
        "1 | train.batch_size=6",
        "  |                  ^",
        "  |",
        "help: batch_size = 5, or repeats = 2 in [[data.source]] entry 1",
    ]


def test_optimizer_arguments_are_checked_against_the_optimizer(tmp_path: Path) -> None:
    path = project(tmp_path)
    plan = plan_of(path, "train.optimizer.name=sgd", "train.optimizer.momentum=0.5")
    assert plan.optimizer.arguments["momentum"] == 0.5
    fault = refusal(path, "train.optimizer.momentum=0.5")
    assert fault.code == "no-effect" and "`betas`" in fault.help
