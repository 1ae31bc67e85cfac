"""The shapes that forward passes have: what compiled blocks are compiled for."""

from __future__ import annotations

from collections.abc import Iterable

from compiler.plan import Bucket

Shape = tuple[int, int, int]  # width, height (pixels), samples


def pass_shapes(buckets: Iterable[Bucket], micro_batch: int = 0) -> set[Shape]:
    """Of full batches, short ones, and the parts of at most `micro_batch` samples (0: whole)."""
    found = set()
    for bucket in buckets:
        short = bucket.samples - (bucket.batches - 1) * bucket.batch_size
        for whole in {bucket.batch_size if bucket.batches > 1 else short, short}:
            cut = 0 < micro_batch < whole
            parts = {micro_batch, whole % micro_batch} - {0} if cut else {whole}
            found |= {(bucket.width, bucket.height, part) for part in parts}
    return found
