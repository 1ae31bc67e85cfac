"""Sources that come and go: every image of every epoch counted, by walking through the run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.data.stages import Gap, Span, epochs_begun, last_step, stages_of, steps_in
from compiler.plan import Bucket
from compiler.units import Interval
from runtime.data.order import Order
from tests.compiler.recipes import codes, compiled
from tests.compiler.test_data_balance import made, project

moments = st.none() | st.one_of(
    st.integers(1, 12).map(lambda n: f"{n} steps"),
    st.integers(1, 6).map(lambda n: f"{n} epochs"),
    st.sampled_from(["0.5 epochs", "2.25 epochs"]),
).map(Interval.parse)


def bucket(name: str, batches: int) -> Bucket:
    return Bucket(
        source=name, width=64, height=64, images=2 * batches, samples=2 * batches, batch_size=2,
        batches=batches,
    )  # fmt: skip


def is_past(moment: Interval, epoch: int, step: int) -> bool:
    return epoch >= moment.epochs if moment.epochs is not None else step >= (moment.steps or 0)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 7), moments, moments), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 9),
    st.booleans(),
)
def test_stages_are_what_walking_finds(
    sources: list[tuple[int, Interval | None, Interval | None]],
    window: int,
    length: int,
    by_steps: bool,
) -> None:
    """Epoch by epoch, with the rule read literally: a source is asked when an epoch begins."""
    buckets = [bucket(str(n), batches) for n, (batches, _, _) in enumerate(sources)]
    spans = {str(n): Span(first=one, until=end) for n, (_, one, end) in enumerate(sources)}
    walked: list[tuple[int, int, tuple[str, ...], int]] = []  # epoch, step, sources, steps
    epoch = step = 0
    gap: int | None = None
    while step < 3 * length if by_steps else epoch < length:
        there = tuple(
            name
            for name, span in spans.items()
            if (span.first is None or is_past(span.first, epoch, step))
            and (span.until is None or not is_past(span.until, epoch, step))
        )
        if not there:
            gap = epoch
            break
        batches = sum(b.batches for b in buckets if b.source in there)
        walked.append((epoch, step, there, -(-batches // window)))
        epoch, step = epoch + 1, step + walked[-1][3]
    asked = {"epochs": None, "total": 3 * length} if by_steps else {"epochs": length, "total": None}
    if gap is not None:
        with pytest.raises(Gap) as caught:
            stages_of(buckets, spans, window, **asked)
        assert caught.value.epoch == gap
        return
    found = stages_of(buckets, spans, window, **asked)
    for epoch, step, there, count in walked:
        (stage,) = [s for s in found if s.first_epoch <= epoch][-1:]
        assert (stage.sources, stage.per_epoch) == (there, count)
        assert stage.first_step + (epoch - stage.first_epoch) * stage.per_epoch == step
    total = 3 * length if by_steps else step_after(walked)
    assert by_steps or last_step(found[-1], length) == total
    assert epochs_begun(found[-1], total) == len(walked)
    assert sum(steps_in(found, total)) == total and min(steps_in(found, total)) > 0


def step_after(walked: list[tuple[int, int, tuple[str, ...], int]]) -> int:
    return walked[-1][1] + walked[-1][3]


def test_every_image_of_every_epoch(tmp_path: Path) -> None:
    """5, 3 and 4 pictures: all along, from the third epoch on with fractions, up to the fourth."""
    path = project(
        tmp_path,
        (5, "repeats = 1.5"),
        (3, 'from = "2 epochs"\nrepeats = 0.5'),
        (4, 'until = "24 steps"'),
    )
    path.write_text(path.read_text().replace("epochs = 2\n", "epochs = 6\naccumulate = 2\n"))
    plan, manifest = made(compiled(path))
    # 8 + 4 batches are 6 steps; from epoch 3 on 8 + 2 + 4 are 7; step 24 lies in epoch 4
    assert [(s.first_epoch, s.first_step, s.per_epoch) for s in plan.steps.stages] == [
        (0, 0, 6), (2, 12, 7), (4, 26, 5),
    ]  # fmt: skip
    assert plan.steps.total == 36 and plan.steps.epochs == 6 and plan.steps.per_epoch == 6
    order = Order.of_plan(plan, manifest)
    epochs: dict[int, Counter[str]] = {}
    for step in range(plan.steps.total):
        seen = epochs.setdefault(order.epoch_of(step), Counter())
        seen.update(manifest.name(int(row)) for b in order.window(step) for row in b.rows)
    assert list(epochs) == list(range(6))
    whole = Counter[str]()
    for number, seen in epochs.items():
        counts = Counter[str]()
        for name, count in seen.items():
            counts[name[:2]] += count
            assert count <= (2 if name.startswith("s0") else 1)
        assert counts == Counter(s0=8, s1=2 * (number >= 2), s2=4 * (number < 4)) + Counter()
        whole += seen
    rest = [count for name, count in whole.items() if name.startswith("s1")]
    assert sum(rest) == 8 and max(rest) - min(rest) <= 1
    backward = [order.window(step)[0].rows.tolist() for step in range(35, -1, -1)]
    fresh = Order.of_plan(plan, manifest)
    assert [fresh.window(step)[0].rows.tolist() for step in range(36)] == backward[::-1]


def test_one_that_ends_after_the_run_changes_no_order(tmp_path: Path) -> None:
    path = project(tmp_path, (5, ""), (3, ""))
    plain = made(compiled(path))
    path = project(tmp_path / "b", (5, ""), (3, 'until = "1000 epochs"'))
    staged = made(compiled(path))
    assert plain[0].steps.stages == () and len(staged[0].steps.stages) == 1
    for step in range(plain[0].steps.total):
        one, other = (Order.of_plan(*each).window(step) for each in (plain, staged))
        assert [b.rows.tolist() for b in one] == [b.rows.tolist() for b in other]


@pytest.mark.parametrize(
    ("sources", "code", "words"),
    [
        ([(2, 'until = "1 epoch"')], "conflict", "epoch 2"),
        ([(2, 'from = "1 epoch"')], "conflict", "epoch 1"),
        ([(2, ""), (2, 'from = "2 epochs"')], "no-effect", "never trains"),
        ([(2, ""), (2, 'from = "1.2 epochs"\nuntil = "1.7 epochs"')], "no-effect", "never trains"),
        ([(2, ""), (2, 'until = "1.5 epochs"')], "no-effect", "never leaves"),
        ([(2, ""), (2, 'until = "7 steps"')], "no-effect", "never leaves"),
        ([(2, ""), (2, 'from = "10 min"')], "bad-unit", "is a time"),
        ([(2, ""), (2, 'until = "off"')], "bad-unit", "no moment"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, sources: list[tuple[int, str]], code: str, words: str
) -> None:
    result = compiled(project(tmp_path, *sources))
    assert result.plan is None and codes(result) == [code]
    assert words in result.diagnostics[0].message


@pytest.mark.parametrize("until", ["2 epochs", "8 steps", "1 epoch", "3 steps"])
def test_one_that_leaves_or_stays_to_the_end_is_not_refused(tmp_path: Path, until: str) -> None:
    plan = made(compiled(project(tmp_path, (2, ""), (2, f'until = "{until}"'))))[0]
    assert (plan.steps.total == 8) == (until in ("2 epochs", "8 steps"))


def test_what_to_do_where_nothing_trains(tmp_path: Path) -> None:
    result = compiled(project(tmp_path / "a", (2, 'from = "1 epoch"\nuntil = "2 epochs"')))
    fault = result.diagnostics[0]
    assert fault.path == "data.source[0].from" and "leave `from` out" in fault.help
    result = compiled(project(tmp_path / "b", (2, 'until = "1 epoch"')))
    fault = result.diagnostics[0]
    assert fault.path == "data.source[0].until" and fault.help.endswith("epochs = 1")


def test_the_plan_says_who_trains_when(tmp_path: Path) -> None:
    from tuner.data_page import page
    from tuner.plan_view import text

    path = project(tmp_path, (5, ""), (3, 'from = "1 epoch"'))
    plan, manifest = made(compiled(path))
    told = text(plan, recipe="recipe.toml")
    assert "epoch 2, from step 6" in told and "s0, s1: 8 samples in 8 steps an epoch" in told
    assert "Who trains when" in page(plan, manifest, None, (), 1)
