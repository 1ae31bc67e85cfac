"""How many samples, batches and steps: exact arithmetic on the decimal numbers people write.

In each bucket `ceil(images * repeats)` samples an epoch and `ceil(samples / batch)` batches, the
last of which may be short; a step takes a window of `ranks * accumulate` batches, which may cross
buckets but not the end of an epoch. Nothing is dropped and nothing is rounded twice: 10 images
1.1 times are 11 samples, although 10 * 1.1 in binary is more than 11.

Several ranks (devices) deal a window out like cards: rank r takes its batches r, r + ranks, r + 2
ranks, ... A whole window gives each rank `accumulate` batches. The last window of an epoch may be
short, and then the first ranks have one batch more than the others. A rank without one adds zero
to the sum of gradients, and all ranks meet once a step, in the reduction of that sum, so that none
waits for another for ever. The sum is divided by the samples of the whole window. Nothing is
dropped, nothing is padded with doubles, and the steps of R ranks are those of one rank that
accumulates R times as many batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

from compiler.data.manifest import Manifest
from compiler.plan import Bucket, DataSource


def samples_per_epoch(images: int, repeats: str) -> int:
    """ceil(images * repeats); `repeats` is a decimal number as text."""
    return ceil(images * Fraction(repeats))


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """ceil(samples / batch_size)."""
    return -(-samples // batch_size)


def steps_per_epoch(batches: int, ranks: int, accumulate: int) -> int:
    """ceil(batches / (ranks * accumulate)); `batches` are those of all buckets and ranks."""
    return -(-batches // (ranks * accumulate))


def batches_of_rank(batches: int, ranks: int, rank: int) -> int:
    """How many of the `batches` of a window, or of whole windows in a row, go to `rank`."""
    return len(range(rank, batches, ranks))


def bucket_rows(
    manifest: Manifest, sources: Sequence[DataSource], batch_sizes: Sequence[int]
) -> tuple[Bucket, ...]:
    """The plan's buckets in the manifest's order; `sources` in the order of its folders, with the
    batch size of each."""
    assert [source.id for source in sources] == [folder.id for folder in manifest.folders]
    return tuple(
        _row(
            members.width,
            members.height,
            len(members.samples),
            sources[members.source],
            batch_sizes[members.source],
        )
        for members in manifest.buckets
    )


def _row(width: int, height: int, images: int, source: DataSource, batch_size: int) -> Bucket:
    samples = samples_per_epoch(images, source.repeats)
    return Bucket(
        source=source.id,
        width=width,
        height=height,
        images=images,
        samples=samples,
        batch_size=batch_size,
        batches=batches_per_epoch(samples, batch_size),
    )
