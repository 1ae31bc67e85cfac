"""Several ranks take what one would: every batch once, and zero where there is none left."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.data.counts import batches_of_rank
from runtime.data.order import Group, Order


def order_of(buckets: list[int], batch_size: int, window: int) -> Order:
    starts = np.cumsum([0, *buckets])
    groups = [
        Group(rows=np.arange(start, start + size), samples=size, batch_size=batch_size)
        for start, size in zip(starts, buckets, strict=False)
    ]
    return Order(groups, seed=3, window=window)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_ranks_share_a_window_without_loss(
    buckets: list[int], batch_size: int, ranks: int, accumulate: int
) -> None:
    """The mean over a window, added up by rank and divided once, is the mean of its samples."""
    order = order_of(buckets, batch_size, ranks * accumulate)
    values = np.random.default_rng(0).normal(size=sum(buckets))
    dealt = [0] * ranks
    seen: list[int] = []
    for step in range(order.steps_per_epoch):
        window = order.window(step)
        shares = [window[rank::ranks] for rank in range(ranks)]
        sums = [sum(float(values[batch.rows].sum()) for batch in share) for share in shares]
        rows = np.concatenate([batch.rows for batch in window])
        assert all(total == 0 for total, share in zip(sums, shares, strict=True) if not share)
        assert np.isclose(sum(sums) / len(rows), values[rows].mean())
        seen += rows.tolist()
        dealt = [one + len(share) for one, share in zip(dealt, shares, strict=True)]
    assert sorted(seen) == list(range(sum(buckets)))
    expected = [batches_of_rank(order.batches_per_epoch, ranks, rank) for rank in range(ranks)]
    assert dealt == expected


def test_the_steps_of_ranks_are_those_of_accumulation() -> None:
    """Two ranks that accumulate 3 times take, step by step, what one takes that does 6 times."""
    together, alone = order_of([13, 8], 2, 2 * 3), order_of([13, 8], 2, 6)
    for step in range(2 * together.steps_per_epoch):
        one, other = together.window(step), alone.window(step)
        assert [b.rows.tolist() for b in one] == [b.rows.tolist() for b in other]
        assert [b.first_slot for b in one] == [b.first_slot for b in other]
