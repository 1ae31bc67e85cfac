"""Repeats, weights, class images and what is held out: every image of every epoch is counted."""

from __future__ import annotations

import shutil
from collections import Counter
from fractions import Fraction
from math import ceil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.compile import Compiled
from compiler.data.manifest import Manifest
from compiler.data.split import count_held_out, held_out
from compiler.passes.balance import nearest_passes, samples_of, spelt
from compiler.plan import Plan
from runtime.data.order import Order
from tests.compiler.recipes import codes, compiled, make_base, make_pictures
from tuner.plan_view import text

HEAD = """\
name = "try"
[model]
family = "sana"
base = "base"
[data]
resolution = 64
captions = { from = "instance", prompt = "a dog" }
"""
TAIL = "[train]\nepochs = 2\nbatch_size = 1\noptimizer = { lr = 1e-4 }\n"


def project(folder: Path, *sources: tuple[int, str]) -> Path:
    """A recipe with a source for each (number of pictures, further lines)."""
    make_base(folder / "base")
    lines = [HEAD]
    for number, (images, more) in enumerate(sources):
        make_pictures(folder / f"s{number}", [(64, 64)] * images)
        lines.append(f'[[data.source]]\npath = "s{number}"\n{more}\n')
    path = folder / "recipe.toml"
    path.write_text("".join([*lines, TAIL]), encoding="utf-8")
    return path


def made(result: Compiled) -> tuple[Plan, Manifest]:
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    return result.plan, result.manifest


def epoch(plan: Plan, manifest: Manifest, number: int) -> Counter[str]:
    """How often each picture is taken in an epoch, by walking through its steps."""
    order = Order.of_plan(plan, manifest)
    steps = range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch)
    return Counter(
        manifest.name(int(row)) for step in steps for b in order.window(step) for row in b.rows
    )


def test_weights_by_hand(tmp_path: Path) -> None:
    """10 and 4 images, weights 1 and 2: 10 / 1 is the larger ratio, so 10 and 20 samples."""
    path = project(tmp_path, (10, "weight = 1"), (4, "weight = 2.0"))
    plan, manifest = made(compiled(path))
    assert [source.repeats for source in plan.sources] == ["1", "5"]
    assert [bucket.samples for bucket in plan.buckets] == [10, 20]
    assert plan.steps.samples_per_epoch == plan.steps.per_epoch == 30
    for number in range(2):
        seen = epoch(plan, manifest, number)
        assert Counter(seen.values()) == {1: 10, 5: 4}
    why = next(d for d in plan.decisions if d.key == "data.source[1].repeats")
    assert why.value == "5" and "weight 2: 20 samples of 4 images" in why.why


def test_weights_that_do_not_divide(tmp_path: Path) -> None:
    path = project(tmp_path, (3, "weight = 0.3"), (7, "weight = 0.7"), (5, "weight = 1.1"))
    plan, manifest = made(compiled(path))
    images, weights = [3, 7, 5], [Fraction(3, 10), Fraction(7, 10), Fraction(11, 10)]
    scale = max(n / w for n, w in zip(images, weights, strict=True))
    assert [Fraction(s.repeats) * n for s, n in zip(plan.sources, images, strict=True)] == [
        scale * weight for weight in weights
    ]
    seen = epoch(plan, manifest, 0)
    for number, (count, weight) in enumerate(zip(images, weights, strict=True)):
        mine = [n for name, n in seen.items() if name.startswith(f"s{number}/")]
        assert len(mine) == count and sum(mine) == ceil(scale * weight)
        assert max(mine) - min(mine) <= 1


def test_weight_over_resolutions_and_mirror_images(tmp_path: Path) -> None:
    """A source's samples are counted over all of its resolutions."""
    more = "weight = 1\nresolution = [64, 96]\nflip = true"
    path = project(tmp_path, (3, more), (5, "weight = 1"))
    plan, manifest = made(compiled(path))
    assert [s.repeats for s in plan.sources] == ["1", "1", "2.4"]
    assert [b.samples for b in plan.buckets] == [6, 6, 12] and len(manifest) == 17
    assert sum(epoch(plan, manifest, 0).values()) == 24


@pytest.mark.parametrize(
    ("sources", "code", "words"),
    [
        ([(2, "weight = 1\nrepeats = 2"), (2, "weight = 1")], "conflict", "leave one of them"),
        ([(2, "weight = 1"), (2, "")], "conflict", "weight = 1.0 in [[data.source]] entry 2"),
        ([(2, "weight = 1")], "no-effect", "repeats = 2"),
        ([(2, "weight = 0"), (2, "weight = 1")], "out-of-range", ""),
        ([(2, "holdout = 1.5")], "out-of-range", "holdout = 0.1"),
        ([(2, "holdout = 2")], "holdout-too-large", "holdout = 0.1"),
        ([(2, "holdout = 0.99")], "holdout-too-large", "holdout = 0.1"),
        ([(2, "holdout = -1")], "out-of-range", ""),
        ([(2, "regularisation = { weight = 0 }")], "out-of-range", ""),
    ],
)
def test_what_is_refused(
    tmp_path: Path, sources: list[tuple[int, str]], code: str, words: str
) -> None:
    result = compiled(project(tmp_path, *sources))
    assert result.plan is None and codes(result) == [code]
    assert words in result.diagnostics[0].help


def test_class_images(tmp_path: Path) -> None:
    path = project(tmp_path, (2, ""), (3, "regularisation = { weight = 0.5 }"))
    sources = made(compiled(path))[0].sources
    assert [(s.regularisation, s.loss_weight) for s in sources] == [(False, 1.0), (True, 0.5)]
    path = project(tmp_path / "b", (2, ""), (3, "regularisation = {}"))
    assert made(compiled(path))[0].sources[1].loss_weight == 1.0


ADAPTER = '[adapter]\nkind = "lora"\n'
KEPT = 'regularisation = { target = "base" }'


def adapted(folder: Path, *sources: tuple[int, str]) -> Path:
    path = project(folder, *sources)
    path.write_text(path.read_text() + ADAPTER)
    return path


def test_the_base_as_target(tmp_path: Path) -> None:
    path = adapted(tmp_path, (2, ""), (3, KEPT + "\nresolution = [64, 96]"))
    plan = made(compiled(path))[0]
    assert [s.target for s in plan.sources] == ["image", "base", "base"]
    shown = " ".join(text(plan, recipe="r.toml", verbose=True).split())
    assert "what the base predicts is learned" in shown


@pytest.mark.parametrize(
    ("sources", "adapter", "words"),
    [
        ([(2, ""), (3, KEPT)], False, "would need a second copy of the model"),
        ([(2, KEPT), (3, KEPT)], True, "nothing would be learned"),
    ],
)
def test_a_target_without_a_frozen_base_or_anything_to_learn(
    tmp_path: Path, sources: list[tuple[int, str]], adapter: bool, words: str
) -> None:
    result = compiled((adapted if adapter else project)(tmp_path, *sources))
    assert result.plan is None and codes(result) == ["conflict"]
    (found,) = result.diagnostics
    assert words in found.message and found.path.endswith("regularisation.target")
    assert found.help


def test_what_is_held_out_is_not_trained(tmp_path: Path) -> None:
    more = "holdout = 0.3\nresolution = [64, 96]\nflip = true\nrepeats = 1.5"
    path = project(tmp_path, (10, more), (4, ""))
    plan, manifest = made(compiled(path))
    out = held_out([f"{n:03}.png" for n in range(10)], Fraction("0.3"), 0)
    assert len(out) == 3 and [s.held_out for s in plan.sources] == [3, 3, 0]
    for number in range(3):
        names = epoch(plan, manifest, number)
        keys = {
            name.partition("/")[2].removesuffix(" (mirrored)")
            for name in names
            if name.startswith("s0@")
        }
        assert keys == {f"{n:03}.png" for n in range(10)} - out
        assert len({name for name in names if name.startswith("s0@64/")}) == 14


def test_no_other_source_trains_what_is_held_out(tmp_path: Path) -> None:
    path = project(tmp_path, (5, "holdout = 2"), (2, ""))
    path.write_text(path.read_text().replace('path = "s1"', 'id = "again"\npath = "s0"'))
    result = compiled(path)
    assert result.plan is None and codes(result) == ["holdout-leak"]
    assert "source 2 trains 2 of the images" in result.diagnostics[0].message
    both = path.read_text().replace('path = "s0"\n\n[train]', 'path = "s0"\nholdout = 2\n[train]')
    path.write_text(both)
    manifest = made(compiled(path))[1]
    assert len(manifest) == 6 and len({sample.key for sample in manifest}) == 3


def test_no_link_hides_a_picture_that_is_held_out(tmp_path: Path) -> None:
    """A linked folder, and a link beside its picture."""
    path = project(tmp_path, (5, "holdout = 2"), (2, ""))
    (tmp_path / "link").symlink_to("s0", target_is_directory=True)
    path.write_text(path.read_text().replace('path = "s1"', 'path = "link"'))
    result = compiled(path)
    assert result.plan is None and codes(result) == ["holdout-leak"]
    path.write_text(path.read_text().replace('path = "link"', 'path = "s1"'))
    for number in range(5):
        (tmp_path / f"s0/x{number}.png").symlink_to(f"{number:03}.png")
    _, manifest = made(compiled(path))
    assert manifest.held_out is not None
    names = [sample.key.removeprefix("x") for sample in manifest.held_out]
    digits = Counter(int(name.removesuffix(".png")) for name in names)
    assert sorted(digits.values()) == [2, 2]  # two pictures, each under both its names
    trained = {int(s.key.removeprefix("x").removesuffix(".png")) for s in manifest if s.source == 0}
    assert trained == set(range(5)) - set(digits)


keys_of = st.lists(st.text(min_size=1), unique=True, max_size=40)
holdouts = st.fractions(0, 1).filter(lambda x: x < 1) | st.integers(0, 50).map(Fraction)


@given(keys_of, holdouts, holdouts, st.integers(0, 9), st.randoms())
def test_the_split(keys: list[str], one: Fraction, other: Fraction, seed: int, random) -> None:  # type: ignore[no-untyped-def]
    out = held_out(keys, one, seed)
    assert out <= set(keys)
    assert len(out) == min(len(keys), count_held_out(len(keys), one))
    shuffled = random.sample(keys, len(keys))
    assert held_out(shuffled, one, seed) == out  # the order on disk does not matter
    more = held_out(keys, other, seed)
    assert out <= more or more <= out  # a larger one holds out more, never others


counts_of = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@given(counts_of, st.fractions(1, 6, max_denominator=50))
def test_the_nearest_passes(buckets: list[int], passes: Fraction) -> None:
    """Against all passes at which a bucket's samples change."""
    samples = passes * sum(buckets)
    found = nearest_passes(samples, buckets)
    assert 1 <= found <= passes
    every = {Fraction(k, n) for n in buckets for k in range(n, int(n * passes) + 1)} | {passes}
    best = min(abs(samples_of(each, buckets) - samples) for each in every)
    if samples_of(passes, buckets) == ceil(samples):
        assert found == passes  # no rounding but to whole samples
    else:
        assert abs(samples_of(found, buckets) - samples) == best


SHAPES = [(128 + 32 * n, 128) for n in range(17)]
SMALL = ("resolution = 64", "resolution = 128\nmultiple = 32\nupscale = false")


def test_weights_where_buckets_are_small(tmp_path: Path) -> None:
    """17 images in 7 buckets beside 18 in one: with exact passes 24 samples to 18."""
    path = project(tmp_path, (1, "weight = 1"), (18, "weight = 1"))
    path.write_text(path.read_text().replace(*SMALL))
    for number, sizes in enumerate((SHAPES, [(128, 128)] * 18)):
        shutil.rmtree(tmp_path / f"s{number}")
        make_pictures(tmp_path / f"s{number}", sizes)
    result = compiled(path)
    plan, manifest = made(result)
    own = [bucket for bucket in plan.buckets if bucket.source == "s0"]
    assert len(own) == 7 and codes(result) == []
    assert sum(ceil(b.images * Fraction(18, 17)) for b in own) == 24
    assert [source.repeats for source in plan.sources] == ["1", "1"]
    seen = epoch(plan, manifest, 0)
    assert sum(seen.values()) == 35 and set(seen.values()) == {1}
    why = next(d for d in plan.decisions if d.key == "data.source[0].repeats").why
    assert "weight 1: 18 samples of 17 images; 17 come nearest" in why


def test_repeats_where_buckets_are_small_are_warned_of(tmp_path: Path) -> None:
    path = project(tmp_path, (1, "repeats = 0.25"), (18, ""))
    path.write_text(path.read_text().replace(*SMALL))
    for number, sizes in enumerate((SHAPES, [(128, 128)] * 18)):
        shutil.rmtree(tmp_path / f"s{number}")
        make_pictures(tmp_path / f"s{number}", sizes)
    result = compiled(path)
    plan, _ = made(result)
    own = [bucket.samples for bucket in plan.buckets if bucket.source == "s0"]
    fault = next(d for d in result.diagnostics if d.code == "uneven-rounding")
    assert f"`s0` gives {sum(own)} samples an epoch, not 5" in fault.message
    assert fault.path == "data.source[0].repeats" and fault.severity == "warning"
    path.write_text(path.read_text().replace("[data]", '[data]\ncrop = { aspect = "square" }'))
    result = compiled(path)
    assert codes(result) == []
    assert [bucket.samples for bucket in made(result)[0].buckets] == [5, 18]


@given(st.fractions(0, 100))
def test_passes_are_spelt_exactly(number: Fraction) -> None:
    assert Fraction(spelt(number)) == number


def test_passes_are_spelt_as_people_do() -> None:
    numbers = (Fraction(5), Fraction(5, 2), Fraction(7, 3), Fraction(1, 8), Fraction(101, 100))
    assert [spelt(n) for n in numbers] == ["5", "2.5", "7/3", "0.125", "1.01"]
