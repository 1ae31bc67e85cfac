"""Which pictures the VAE encodes together: those of one bucket, in the manifest's order.

Which of them share a batch follows from the data alone; no clock, no thread, no number of ranks and
nothing that is cached already has a say in it. A batch of which a latent is missing is encoded
whole, and what was there stays. So a run that was killed while it filled the cache, and was begun
again, trains on the numbers of one that was not. A picture that can't be decoded leaves its place
empty; no other moves up.

Two things this can't promise. Kernels are chosen by batch size, so the last bits of a latent may
depend on how many are in its batch; and what another run has cached under the same keys, of the
same picture in other company, is used as it is.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from compiler.data.manifest import Manifest
from runtime.data.packed import Keys, Rows, reading_order


@frozen(eq=False)
class VaeBatches:
    """All batches of a manifest; there may be millions."""

    rows: Rows  # each key once, bucket by bucket
    starts: Rows  # where each batch begins in `rows`, and behind them the number of rows

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Rows:
        """The rows of one batch, of one size."""
        return self.rows[self.starts[number] : self.starts[number + 1]]

    def unfinished(self, lacking: NDArray[np.bool_]) -> Rows:
        """Numbers of the batches of which a row is `lacking`, which says it of each row."""
        places = np.flatnonzero(lacking[self.rows])
        found: Rows = np.unique(np.searchsorted(self.starts, places, side="right") - 1)
        return found


def vae_batches(manifest: Manifest, keys: Keys, size: int) -> VaeBatches:
    """The pictures of each bucket, `size` at a time; the last batch of a bucket may be short.

    Of rows with one key only the first is encoded. Containers are read from front to back.
    """
    bucket, found = np.zeros(len(manifest), np.int32), [np.empty(0, np.int64)]
    for number, members in enumerate(manifest.buckets):
        rows = np.frombuffer(members.samples, np.uint32).astype(np.int64)
        alone = manifest.folders[members.source].kind == "folder"
        found.append(rows if alone else reading_order(manifest, rows))
        bucket[rows] = number
    every = keys.firsts(np.concatenate(found))
    ends = np.cumsum(np.bincount(bucket[every], minlength=len(manifest.buckets))).tolist()
    starts = [np.arange(begin, end, size) for begin, end in pairwise([0, *ends])]
    return VaeBatches(every, np.concatenate([*starts, [len(every)]]).astype(np.int64))
