"""Batches, ranks and batch sizes by resolution, through the whole compiler, against counting."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from math import ceil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.plan import Plan
from tests.compiler.recipes import codes, compiled, make_pictures, project
from tests.compiler.test_compile import decision, plan_of, refusal

SIZES = [(64, 64)] * 7 + [(128, 64)] * 4 + [(64, 128)] * 2 + [(256, 64)]
"""Shapes whose buckets at a resolution of 64 differ, so that pictures of one shape share one."""
TWO = '[[data.source]]\npath = "wide"\nresolution = 128\nrepeats = 1.5\n' + (
    'captions = { from = "instance", prompt = "b" }\n'
)


def table(**entries: int) -> str:
    inside = ", ".join(f"{key.removeprefix('r')} = {value}" for key, value in entries.items())
    return f"train.batch_size={{ {inside} }}"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batches")
    path = project(folder)
    make_pictures(folder / "mixed", SIZES)
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Five pictures at 64 pixels, and four at 128 that count 1.5 times."""
    path = project(tmp_path)
    make_pictures(tmp_path / "wide", [(128, 128)] * 4)
    text = path.read_text().replace("[train]", TWO + "[train]")
    path.write_text(text)
    return path


def counted(plan: Plan, repeats: str, batch: int, ranks: int, accumulate: int) -> int:
    """Steps of an epoch, by dealing out one sample after the other; buckets are those of SIZES."""
    batches = 0
    for images in Counter(SIZES).values():
        taken, room = 0, 0
        while taken < images * Decimal(repeats):
            if room == 0:
                batches, room = batches + 1, batch
            taken, room = taken + 1, room - 1
    steps, waiting = 0, 0
    for _ in range(batches):
        waiting += 1
        if waiting == ranks * accumulate:
            steps, waiting = steps + 1, 0
    assert plan.steps.batches_per_epoch == batches
    return steps + (waiting > 0)


@settings(max_examples=40, deadline=None)
@given(
    st.decimals(Decimal("0.5"), Decimal(6), places=2),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_steps_are_those_that_counting_gives(
    mixed: Path, repeats: Decimal, batch: int, ranks: int, accumulate: int, epochs: int
) -> None:
    plan = plan_of(
        mixed,
        'data.source[0].path="mixed"',
        f"data.source[0].repeats={repeats}",
        f"train.batch_size={batch}",
        f"train.accumulate={accumulate}",
        f"train.epochs={epochs}",
        f"launch.devices={ranks}",
    ) if batch <= len(SIZES) * repeats else None  # fmt: skip
    if plan is None:
        return
    per_epoch = counted(plan, str(repeats), batch, ranks, accumulate)
    assert plan.steps.per_epoch == per_epoch
    assert plan.steps.total == epochs * per_epoch
    assert plan.steps.ranks == ranks


def test_one_device_unless_more_are_asked_for(two: Path) -> None:
    assert plan_of(two, "train.batch_size=1").steps.ranks == 1
    plan = plan_of(two, "train.batch_size=1", "launch.devices=3")
    assert (plan.steps.ranks, plan.steps.batches_per_epoch, plan.steps.per_epoch) == (3, 11, 4)
    assert decision(plan, "launch.devices") == ("3", "--set")
    assert decision(plan, "launch.strategy") == ("ddp", "pass memory")


def test_a_strategy_for_one_device_is_refused(two: Path) -> None:
    found = refusal(two, "launch.devices=1", 'launch.strategy="ddp"')
    assert (found.code, found.path) == ("no-effect", "launch.strategy")
    assert compiled(two, 'launch.strategy="ddp"').plan is not None


def test_more_devices_than_batches_is_warned_of(two: Path) -> None:
    found = compiled(two, "launch.devices=64")
    assert codes(found) == ["idle-devices"]
    assert "some never have any work" in found.diagnostics[0].message


def test_a_batch_size_for_each_resolution(two: Path) -> None:
    plan = plan_of(two, table(r64=5, r128=2))
    rows = [(b.width, b.samples, b.batch_size, b.batches) for b in plan.buckets]
    assert rows == [(64, 5, 5, 1), (128, 6, 2, 3)]
    assert decision(plan, "train.batch_size.64") == ("5", "--set")


def test_a_resolution_without_a_batch_size_is_named(two: Path) -> None:
    found = refusal(two, table(r64=2, r512=1))
    assert found.code == "missing-key" and found.path == "train.batch_size"
    assert "no entry for resolution 128" in found.message
    assert found.help.startswith("add 128 = 1;")


def test_a_batch_size_for_no_resolution_is_refused(two: Path) -> None:
    found = refusal(two, table(r64=2, r128=1, r512=1))
    assert (found.code, found.path) == ("no-effect", "train.batch_size.512")
    assert found.help == "the sources have 64, 128"


def test_a_wrong_batch_size_is_one_mistake(two: Path) -> None:
    assert refusal(two, "train.batch_size={ 64 = 2, 128 = -1 }").code == "out-of-range"
    found = refusal(two, table(r64=2, r128=7))
    assert (found.code, found.path) == ("batch-too-large", "train.batch_size.128")
    assert found.help.startswith("128 = 6, or repeats")


def test_a_resolution_in_megapixels_counts_as_its_root(two: Path) -> None:
    area = 'data.source[1].resolution_type="area"'
    plan = plan_of(two, area, "data.source[1].resolution=0.016384", table(r64=1, r128=2))
    assert [bucket.batch_size for bucket in plan.buckets] == [1, 2]


def dealt(samples: list[int], batch: int, window: int) -> int:
    """Steps of an epoch of sources of one bucket each, by dealing out one sample after the other;
    no batch holds two sources' samples."""
    batches = []
    for count in samples:
        for number in range(count):
            if number % batch == 0:
                batches.append(0)
            batches[-1] += 1
    assert sum(batches) == sum(samples)
    steps = 0
    while batches:
        del batches[:window]
        steps += 1
    return steps


@pytest.mark.parametrize(
    ("images", "repeats", "batch", "accumulate"),
    [(3, "0.3", 4, 1), (3, "0.3", 5, 2), (1, "1", 3, 2), (4, "0.9", 5, 2), (2, "1", 5, 1)],
)
def test_a_source_smaller_than_a_batch_trains_in_short_ones_beside_a_larger(
    images: int, repeats: str, batch: int, accumulate: int, tmp_path: Path
) -> None:
    path = project(tmp_path)
    make_pictures(tmp_path / "few", [(64, 64)] * images)
    more = TWO.replace("1.5", repeats).replace("wide", "few").replace("resolution = 128\n", "")
    path.write_text(path.read_text().replace("[train]", more + "[train]"))
    result = compiled(path, f"train.batch_size={batch}", f"train.accumulate={accumulate}")
    assert codes(result) == ["small-buckets"] and result.plan is not None
    assert "1 of 2 buckets never fill a batch (64x64 of `few`)" in result.diagnostics[0].message
    few = ceil(images * Decimal(repeats))
    assert [bucket.samples for bucket in result.plan.buckets] == [5, few]
    steps = dealt([5, few], batch, accumulate)
    assert (result.plan.steps.per_epoch, result.plan.steps.total) == (steps, 2 * steps)


def test_a_batch_that_no_source_fills_is_refused(two: Path) -> None:
    found = refusal(two, "train.batch_size=7")
    assert found.code == "batch-too-large"
    assert "larger than every source; the largest is `wide`: 4 images x 1.5 = 6" in found.message
    assert found.help == "batch_size = 6, or repeats = 2 in [[data.source]] entry 2"
    assert compiled(two, "train.batch_size=6").plan is not None
