"""The order of training: every image of every epoch counted, by brute force."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.data.counts import batches_per_epoch, samples_per_epoch, steps_per_epoch
from runtime.data.order import Group, Order


def order_of(
    buckets: list[tuple[int, str]], batch_size: int, window: int, seed: int = 0
) -> tuple[Order, list[Group]]:
    """`buckets`: (images, repeats); rows are numbered through all buckets."""
    groups, first = [], 0
    for images, repeats in buckets:
        rows = np.arange(first, first + images, dtype=np.int64)
        first += images
        samples = samples_per_epoch(images, repeats)
        groups.append(Group(rows=rows, samples=samples, batch_size=batch_size))
    return Order(groups, seed=seed, window=window), groups


def epoch(order: Order, number: int) -> list[list[tuple[int, list[int]]]]:
    """All windows of an epoch, as (bucket, rows) per batch."""
    per = order.steps_per_epoch
    return [
        [(batch.bucket, batch.rows.tolist()) for batch in order.window(step)]
        for step in range(number * per, (number + 1) * per)
    ]


buckets_of = st.lists(
    st.tuples(st.integers(1, 25), st.decimals(Decimal("0.05"), Decimal(4), places=2).map(str)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=80, deadline=None)
@given(buckets_of, st.integers(1, 7), st.integers(1, 4), st.integers(0, 9), st.integers(0, 50))
def test_every_epoch_is_complete(
    buckets: list[tuple[int, str]], batch_size: int, window: int, seed: int, number: int
) -> None:
    order, groups = order_of(buckets, batch_size, window, seed)
    windows = epoch(order, number)
    batches = [batch for found in windows for batch in found]
    expected = [batches_per_epoch(group.samples, batch_size) for group in groups]
    assert len(windows) == steps_per_epoch(sum(expected), window, 1)
    assert all(len(found) == window for found in windows[:-1]) and windows[-1]
    for bucket, group in enumerate(groups):
        mine = [rows for which, rows in batches if which == bucket]
        assert len(mine) == expected[bucket]
        assert sorted(map(len, mine)) == sorted(
            [batch_size] * (group.samples // batch_size)
            + [group.samples % batch_size] * (group.samples % batch_size > 0)
        )
        seen = Counter(row for rows in mine for row in rows)
        whole, rest = divmod(group.samples, len(group.rows))
        assert set(seen) <= set(group.rows.tolist())
        assert (
            sorted(seen[r] for r in group.rows.tolist())
            == [whole] * (len(group.rows) - rest) + [whole + 1] * rest
        )


@settings(max_examples=30, deadline=None)
@given(buckets_of, st.integers(1, 5), st.integers(0, 9), st.integers(1, 40))
def test_fractions_are_fair_over_time(
    buckets: list[tuple[int, str]], batch_size: int, seed: int, epochs: int
) -> None:
    order, groups = order_of(buckets, batch_size, 1, seed)
    seen: Counter[int] = Counter()
    for number in range(epochs):
        for found in epoch(order, number):
            seen.update(row for _, rows in found for row in rows)
    for group in groups:
        counts = [seen[row] for row in group.rows.tolist()]
        assert sum(counts) == epochs * group.samples
        assert max(counts) - min(counts) <= 1


def test_any_step_can_be_gone_to() -> None:
    buckets = [(13, "1.7"), (5, "0.4"), (8, "2")]
    order, _ = order_of(buckets, 3, 2, seed=5)
    steps = range(4 * order.steps_per_epoch)
    forward = [[b.rows.tolist() for b in order.window(step)] for step in steps]
    again, _ = order_of(buckets, 3, 2, seed=5)
    backward = [[b.rows.tolist() for b in again.window(step)] for step in reversed(steps)]
    assert forward == backward[::-1]


def test_slots_count_through_the_window() -> None:
    order, _ = order_of([(7, "1"), (3, "1")], 2, 3)
    for step in range(order.steps_per_epoch):
        batches = order.window(step)
        slots = [s for b in batches for s in range(b.first_slot, b.first_slot + len(b.rows))]
        assert slots == list(range(sum(len(b.rows) for b in batches)))


def test_seeds_and_epochs_differ_and_shuffle_evenly() -> None:
    order, _ = order_of([(6, "1")], 1, 1)
    firsts = Counter(order.window(number * 6)[0].rows[0] for number in range(1200))
    assert min(firsts.values()) > 150 and max(firsts.values()) < 250
    other, _ = order_of([(6, "1")], 1, 1, seed=1)
    assert epoch(order, 0) != epoch(order, 1) != epoch(other, 1)


PINNED = [[[1, 3], [4, 2]], [[0, 3], [6, 7]], [[1, 2], [5]]]


def test_order_is_pinned() -> None:
    """Changing the order breaks resuming of all runs; it must not happen by accident."""
    order, _ = order_of([(5, "1.5"), (3, "1")], 2, 2, seed=42)
    assert [[b.rows.tolist() for b in order.window(s)] for s in range(3)] == PINNED


def test_repetitions_keep_apart() -> None:
    """An image does not come back before all others had their turn."""
    order, _ = order_of([(10, "3")], 5, 1)
    assert all(len(set(order.window(step)[0].rows.tolist())) == 5 for step in range(600))


@pytest.mark.parametrize("images", [1000, 1_000_000])
def test_a_million_samples_stay_flat(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, and in work: an epoch is put in order once, whichever of its steps are asked."""
    order, _ = order_of([(images // 2, "1"), (images - images // 2, "1")], 4, 1)
    tracemalloc.start()
    order.window(3 * order.steps_per_epoch + 7)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 16 * images + 100_000 and peak < 100 * images + 200_000
    ordered, made = order._ordered, list[int]()
    monkeypatch.setattr(order, "_ordered", lambda *which: made.append(which[0]) or ordered(*which))
    for step in range(5 * order.steps_per_epoch - 1, 4 * order.steps_per_epoch - 1, -1):
        assert len(order.window(step)) == 1
        if step % 200 == 0 and images > 1000:
            break
    assert made == [4]
