"""What a run holds in memory for each of its samples: counted, not timed."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest
import torch

from compiler import lock
from compiler.data.manifest import Manifest
from runtime.data.cache import Cache
from runtime.data.feed import Feed
from runtime.data.fill import fill_latents, fill_text
from runtime.data.packed import Keys
from runtime.events import Silent
from runtime.families import family_of
from tests.runtime.data.many import many

FEW, MANY = 1_000, 5_000
HELD = 20
"""Bytes a sample that a feed may hold: its row in its bucket (4) and in the epoch's order (4), and
of each batch of two where it begins (8)."""
MOST = 160
"""As many at any moment while a run begins: the list of samples before it lies on the disk (52, and
what its key and its caption say), or keys (32), twice while they are compared."""


def held(folder: Path, count: int) -> tuple[int, int]:
    """(bytes that a feed holds once it has fed, the most while it was made)."""
    folder.mkdir()
    plan, manifest = many(folder, count, batch=2, distinct=10, size=2, channels=4)
    manifest.save(folder / "list")
    (folder / "plan").write_text(lock.dumps(plan))
    del plan, manifest
    gc.collect()
    tracemalloc.start()
    plan, manifest = lock.read(folder / "plan"), Manifest.load(folder / "list")
    manifest.to_disk(folder)
    family, cache = family_of("sana"), Cache(Path(plan.cache_folder))
    fill_text(plan, manifest, family, cache, Silent())
    fill_latents(plan, manifest, family, cache, Silent())
    feed = Feed(plan, manifest, family, cache, torch.device("cpu"))
    for step in (0, 5, plan.steps.per_epoch):
        assert feed.window(step).samples == 2
    gc.collect()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept, peak


def test_what_is_held_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    """Rows, captions and places of a run lie on the disk. (What a chunk of samples takes while it
    is looked at is the same for all counts above one chunk, which is set to less than both.)"""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("runtime.data.packed.TOGETHER", 500)
        patched.setattr("runtime.data.cache.HELD", 100)
        held(tmp_path / "first", 20)  # imports, and what is made once
        few, many_ = (held(tmp_path / str(count), count) for count in (FEW, MANY))
    more = MANY - FEW
    assert (many_[0] - few[0]) / more < HELD, (few, many_)
    assert (many_[1] - few[1]) / more < MOST, (few, many_)


def test_keys_are_as_a_list_of_them() -> None:
    one, other = b"a" * 32, b"b" * 31 + b"\0"
    keys = Keys.of([one, other, one, other, one])
    assert list(keys) == [one, other, one, other, one] and keys[-2] == keys[1] == other
    assert keys[1:3] == [other, one] and len(keys) == 5 and keys == Keys.of(list(keys))
    assert keys != Keys.of([one]) and one in keys and b"c" * 32 not in keys
    keys[4] = other
    assert keys[4] == other
    with pytest.raises(IndexError):
        keys[5]


def test_the_first_of_equal_keys(tmp_path: Path) -> None:
    """Against a set, over keys that share many of their bytes."""
    import numpy as np

    generator = np.random.Generator(np.random.PCG64(0))
    for _ in range(50):
        raw = np.zeros((60, 32), np.uint8)
        raw[np.arange(60), generator.integers(0, 32, 60)] = generator.integers(0, 3, 60)
        keys = Keys.of(row.tobytes() for row in raw)
        rows = generator.permutation(60)[: generator.integers(0, 60)]
        seen: set[bytes] = set()
        expected = [
            row for row in rows.tolist() if keys[row] not in seen and not seen.add(keys[row])
        ]
        assert keys.firsts(rows).tolist() == expected
