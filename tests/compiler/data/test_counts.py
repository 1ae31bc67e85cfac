"""Counts against a brute-force simulation of an epoch, and the published example."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.data.counts import (
    batches_of_rank,
    batches_per_epoch,
    bucket_rows,
    samples_per_epoch,
    steps_per_epoch,
)
from compiler.plan import Bucket, Captions, DataSource, Geometry
from tests.compiler.data.manifests import manifest_of


def source(id: str, repeats: str, images: int) -> DataSource:
    return DataSource(
        id=id,
        path=f"/data/{id}",
        repeats=repeats,
        geometry=Geometry(
            resolution=64.0, resolution_type="pixel", aspect="preserve", crop="center", multiple=64
        ),
        captions=Captions(
            kind="textfile", prompt="", missing="error", multiline="join", dropout=0.0
        ),
        broken="error",
        images=images,
        skipped=0,
    )


@pytest.mark.parametrize(
    ("images", "repeats", "expected"),
    [
        (10, "1.1", 11),
        (10, "0.25", 3),
        (476, "5", 2380),
        (3, "0.1", 1),
        (100, "0.07", 7),
        (7, "1", 7),
        (3, "7/3", 7),
        (7, "12/35", 3),
    ],
)
def test_samples_are_exact(images: int, repeats: str, expected: int) -> None:
    assert samples_per_epoch(images, repeats) == expected


def test_the_tutorial() -> None:
    """476 photographs, 5 passes, batch 6, one bucket: 397 steps an epoch, 11,910 in 30 epochs."""
    (bucket,) = bucket_rows(manifest_of([[476]]), [source("s0", "5", 476)], [6])
    assert (bucket.samples, bucket.batches) == (2380, 397)
    assert 30 * steps_per_epoch(bucket.batches, 1, 1) == 11_910


def simulated(images: int, repeats: Decimal, batch_size: int) -> tuple[int, int]:
    """(samples, batches) by filling batches one sample at a time until the passes are used up."""
    samples = 0
    while Decimal(samples) < images * repeats:
        samples += 1
    batches, room = 0, 0
    for _ in range(samples):
        if room == 0:
            batches, room = batches + 1, batch_size
        room -= 1
    return samples, batches


decimals = st.decimals(Decimal("0.01"), Decimal("6"), places=2)
data_sets = st.lists(
    st.tuples(decimals, st.lists(st.integers(1, 30), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(data_sets, st.integers(1, 9), st.integers(1, 3), st.integers(1, 4))
def test_against_brute_force(
    data: list[tuple[Decimal, list[int]]], batch_size: int, ranks: int, accumulate: int
) -> None:
    manifest = manifest_of([images for _, images in data])
    sources = [source(f"s{i}", str(r), sum(images)) for i, (r, images) in enumerate(data)]
    rows = bucket_rows(manifest, sources, [batch_size] * len(sources))
    expected = [
        (f"s{i}", 64 + 64 * bucket, images, *simulated(images, repeats, batch_size))
        for i, (repeats, buckets) in enumerate(data)
        for bucket, images in enumerate(buckets)
    ]
    assert [_facts(row) for row in rows] == expected
    batches = sum(row.batches for row in rows)
    windows = [
        range(batches)[i : i + ranks * accumulate] for i in range(0, batches, ranks * accumulate)
    ]
    assert steps_per_epoch(batches, ranks, accumulate) == len(windows)
    assert batches == sum(batches_per_epoch(row.samples, batch_size) for row in rows)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4))
def test_a_window_is_dealt_out_like_cards(batches: int, ranks: int, accumulate: int) -> None:
    """Every batch goes to one rank, all ranks take part in every step, none is ahead by two."""
    window = ranks * accumulate
    dealt: list[int] = [0] * ranks
    for start in range(0, batches, window):
        here = [0] * ranks
        for at in range(min(window, batches - start)):
            here[at % ranks] += 1
        assert max(here) - min(here) <= 1 and max(here) <= accumulate
        dealt = [one + more for one, more in zip(dealt, here, strict=True)]
    assert dealt == [batches_of_rank(batches, ranks, rank) for rank in range(ranks)]
    assert sum(dealt) == batches


def _facts(row: Bucket) -> tuple[str, int, int, int, int]:
    return row.source, row.height, row.images, row.samples, row.batches
