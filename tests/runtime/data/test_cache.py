"""The cache: exact, shared, read-only, full, and killed at any instant."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import re
import resource
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from runtime.data import cache as caching
from runtime.data import shards
from runtime.data.cache import Cache, CacheIncomplete, Entry, Located, Rows
from runtime.data.hashes import FileGone, file_hashes, folder_hash
from runtime.data.keep import ORPHAN_SECONDS, damaged, sweep
from runtime.data.shards import ShardDamaged
from runtime.data.store import INDEX, CacheDamaged, CacheNotWritable
from tests.compiler.data.pictures import settle


def key(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def entry(number: int, size: int = 100) -> Entry:
    generator = torch.Generator().manual_seed(number)
    return {
        "mean": torch.randn(2, size, generator=generator),
        "mask": torch.arange(number % 7 + 1) % 2 == 0,
    }


def same(found: Entry, expected: Entry) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items()
    )


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]
DTYPES += [torch.bool, torch.int32, torch.int16, torch.int8]
shapes = st.lists(st.integers(0, 4), max_size=3)
entries = st.dictionaries(
    st.sampled_from(["mean", "std", "a/b", "pooled"]),
    st.tuples(st.sampled_from(DTYPES), shapes),
    min_size=1,
)


@settings(max_examples=15, deadline=None)
@given(st.lists(entries, min_size=1, max_size=5), st.booleans())
def test_any_entry_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    wanted: list[dict[str, tuple[torch.dtype, list[int]]]],
    apart: bool,
) -> None:
    cache = Cache(tmp_path_factory.mktemp("cache"))
    stored = [
        {n: (torch.randn(shape) * 100).to(dtype) for n, (dtype, shape) in each.items()}
        for each in wanted
    ]
    for number, each in enumerate(stored):
        cache.put(key(number), each)
        if apart:
            cache.flush()
    cache.close()
    again = Cache(cache.folder)
    located = again.locate([key(n) for n in range(len(stored))])
    for number, each in enumerate(stored):
        assert same(again.read(located, number), each) and same(again.get(key(number)), each)


def test_views_are_saved_for_themselves(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    both = torch.randn(1, 8, 4, 4)
    mean, std = both.chunk(2, dim=1)
    cache.put(key(1), {"mean": mean[0], "std": std[0]})
    cache.put(key(2), {"mean": both[0].transpose(0, 2)})
    both.zero_()
    cache.flush()
    assert cache.get(key(1))["std"].abs().sum() > 0
    assert cache.get(key(2))["mean"].shape == (4, 4, 8)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) < 2500


def test_reading_writes_nothing_and_finds_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "none")
    assert cache.missing([key(1), key(2), key(1)]) == {key(1), key(2)}
    with pytest.raises(CacheIncomplete, match="1 of 1 entries"):
        cache.get(key(1))
    cache.close()
    assert not (tmp_path / "none").exists()


def test_an_index_whose_maker_was_killed_is_empty(tmp_path: Path) -> None:
    """The file is there before its tables are, with or without SQLite's header."""
    for number, make in enumerate(("", "PRAGMA journal_mode=WAL")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / INDEX).touch()
        database = sqlite3.connect(folder / INDEX)
        database.execute(make)
        database.close()
        cache = Cache(folder)
        assert cache.missing([key(1)]) == {key(1)}
        cache.put(key(1), {"x": torch.ones(3)})
        cache.flush()
        assert cache.missing([key(1)]) == set()
        cache.close()


def test_entries_count_only_after_flush(tmp_path: Path) -> None:
    cache, other = Cache(tmp_path), Cache(tmp_path)
    cache.put(key(1), entry(1))
    assert other.missing([key(1)]) == {key(1)} == cache.missing([key(1)])
    cache.flush()
    assert other.missing([key(1)]) == set() and same(other.get(key(1)), entry(1))


def test_large_amounts_and_long_waits_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "SHARD_BYTES", 3000)
    cache = Cache(tmp_path)
    for number in range(10):
        cache.put(key(number), entry(number))  # about 800 bytes each
    assert len(cache.missing(map(key, range(10)))) == 2
    monkeypatch.setattr(caching, "SHARD_SECONDS", 0.0)
    cache.put(key(10), entry(10))
    assert cache.missing(map(key, range(11))) == set()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_shards_are_safetensors(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(key(1), entry(1))
    cache.close()
    (path,) = tmp_path.rglob("*.safetensors")
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == [f"{key(1).hex()}/mask", f"{key(1).hex()}/mean"]
        assert torch.equal(file.get_tensor(f"{key(1).hex()}/mean"), entry(1)["mean"])


def test_writing_to_an_entry_never_reaches_the_file(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(key(1), entry(1))
    cache.flush()
    cache.get(key(1))["mean"].zero_()
    assert same(Cache(tmp_path).get(key(1)), entry(1))


def test_lost_and_cut_shards_are_missing_and_heal(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for number in range(3):
        cache.put(key(number), entry(number))
        cache.flush()
    first, second = sorted(tmp_path.rglob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    again = Cache(tmp_path)
    assert again.missing(map(key, range(3))) == {key(0), key(1)}
    assert damaged(again.store) == sorted([first.name, second.name])
    with pytest.raises(CacheIncomplete, match="2 of 3"):
        again.locate([key(0), key(1), key(2)])
    again.put(key(0), entry(0))
    again.put(key(1), entry(1))
    again.flush()
    assert all(same(again.get(key(n)), entry(n)) for n in range(3))


def test_verify_finds_flipped_bits(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(key(1), entry(1))
    cache.flush()
    (path,) = tmp_path.rglob("*.safetensors")
    assert damaged(cache.store) == []
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert damaged(cache.store) == [path.name]


def test_sweep_removes_only_old_orphans(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert sweep(cache.store) == []
    cache.put(key(1), entry(1))
    cache.flush()
    folder = next(tmp_path.rglob("*.safetensors")).parent
    old, new = folder / "old.safetensors", folder / ".partial-new.safetensors"
    for path in (old, new):
        path.write_bytes(b"x")
    long_ago = time.time() - 2 * ORPHAN_SECONDS
    for path in folder.iterdir():
        if path != new:
            os.utime(path, (long_ago, long_ago))
    assert sweep(cache.store) == ["old.safetensors"] and new.exists()
    assert same(cache.get(key(1)), entry(1))


def test_damaged_index_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "cache-1.sqlite").write_bytes(b"rubbish" * 500)
    with pytest.raises(CacheDamaged, match="is damaged") as caught:
        Cache(tmp_path).missing([key(1)])
    assert str(tmp_path) in caught.value.help


def read_only_check(folder: Path) -> None:
    """Runs in a process of its own; the administrator gives up all rights first."""
    if os.geteuid() == 0:
        os.setuid(65_534)
    cache = Cache(folder)
    assert same(cache.get(key(1)), entry(1)) and cache.missing([key(2)]) == {key(2)}
    assert file_hashes(cache, ["/dev/null"])[0].hex().startswith("e3b0c44298fc")
    cache.put(key(2), entry(2))
    with pytest.raises(CacheNotWritable, match="can't be written"):
        cache.flush()


@pytest.mark.parametrize("killed", [False, True])
def test_read_only_cache(killed: bool) -> None:
    """Also one whose last writer was killed and left its journal behind."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        cache = Cache(Path(name) / "cache")
        cache.put(key(1), entry(1))
        cache.close()
        if killed:
            forked(put_and_die, cache.folder).join()
        os.chmod(name, 0o755)
        for path in [*cache.folder.rglob("*"), cache.folder]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        process = forked(read_only_check, cache.folder)
        process.join()
        cache.folder.chmod(0o755)
        assert process.exitcode == 0


def put_and_die(folder: Path) -> None:
    cache = Cache(folder)
    cache.put(key(7), entry(7))
    cache.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def test_full_disk_is_named_and_tears_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: writes fail in the same places."""
    cache = Cache(tmp_path)
    cache.put(key(1), entry(1))
    cache.flush()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        cache.put(key(2), entry(2, size=100_000))
        with pytest.raises(CacheNotWritable, match="can't be written: File too large") as caught:
            cache.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(caught.value, OSError) and "free some space" in caught.value.help
    assert re.search(r"; [\d,.]+ MiB are free there, to write 1 entry of", caught.value.message)
    assert len(list((tmp_path / "shards-1").iterdir())) == 1
    assert cache.missing([key(1), key(2)]) == {key(2)}
    cache.put(key(2), entry(2))
    cache.flush()
    assert same(cache.get(key(2)), entry(2))


def test_full_disk_at_the_commit_leaves_no_orphan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    cache.put(key(1), entry(1))
    cache.flush()

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    cache.put(key(2), entry(2))
    with monkeypatch.context() as patch:
        patch.setattr(caching, "_layout_number", full)
        with pytest.raises(CacheNotWritable, match=r"disk is full; .* MiB are free there"):
            cache.flush()
    assert len(list((tmp_path / "shards-1").iterdir())) == 1
    assert Cache(tmp_path).missing([key(1), key(2)]) == {key(2)}


def forked(target: Any, *arguments: Any) -> Any:
    """A process that starts in milliseconds, because it imports nothing."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def write_until_killed(folder: Path, first: int, said: Any) -> None:
    cache = Cache(folder)
    for number in range(first, first + 500):
        cache.put(key(number), entry(number, size=20_000))
        if number % 3 == 2:
            cache.flush()
            os.write(said, b"%d " % number)


def killed_after(seconds: float, folder: Path, firsts: list[int]) -> set[int]:
    """Two writers at once, killed; the entries that they said were safe."""
    pipes = [os.pipe() for _ in firsts]
    processes = [
        forked(write_until_killed, folder, first, pipe[1])
        for first, pipe in zip(firsts, pipes, strict=True)
    ]
    time.sleep(seconds)
    for process in processes:
        process.kill()
        process.join()
    promised: set[int] = set()
    for first, (out, into) in zip(firsts, pipes, strict=True):
        os.close(into)
        with open(out, "rb") as pipe:
            words = pipe.read().split()
        promised |= set(range(first, max([int(w) + 1 for w in words], default=first)))
    return promised


def test_killed_writers_lose_only_what_was_not_flushed(tmp_path: Path) -> None:
    """Killed at random instants, again and again, with a reader that stays open."""
    reader, randomly = Cache(tmp_path), random.Random(4)
    everything: list[int] = []
    promised: set[int] = set()
    for round_ in range(12):
        firsts = [1000 * (2 * round_ + i) for i in range(2)]
        promised |= killed_after(randomly.uniform(0.01, 0.25), tmp_path, firsts)
        everything += [first + i for first in firsts for i in range(500)]
    there = set(everything) - {
        int.from_bytes(k[:4], "big") for k in reader.missing(map(key, everything))
    }
    assert promised <= there and len(promised) > 20
    located = reader.locate([key(n) for n in sorted(there)])
    for place, number in enumerate(sorted(there)):
        assert same(reader.read(located, place), entry(number, size=20_000))
    assert damaged(reader.store) == []
    with sqlite3.connect(tmp_path / "cache-1.sqlite") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_file_hashes_are_remembered_by_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{n}\udce9" for n in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
    settle()
    names = list(map(str, paths))
    cache = Cache(tmp_path / "cache")
    first = file_hashes(cache, names, 2)
    assert first[1].hex() == "4bf5122f344554c53bde2ebb8cd2b7e3d1600ad631c385a5d7cce23c7785459a"
    opened: list[str] = []
    real = caching.hashlib.file_digest
    monkeypatch.setattr(
        "runtime.data.hashes.hashlib.file_digest",
        lambda file, name: opened.append(file.name) or real(file, name),
    )
    assert file_hashes(Cache(tmp_path / "cache"), names) == first and opened == []
    before = paths[2].stat()
    paths[2].write_bytes(b"x")
    os.utime(paths[2], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_hashes(cache, names)[2] != first[2] and opened == [names[2]]
    paths[0].unlink()
    with pytest.raises(FileGone, match="can't be read"):
        file_hashes(cache, names)


def test_folder_hash_covers_weights_names_and_configuration(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    seen = set()
    folder = tmp_path / "vae"
    (folder / "sub").mkdir(parents=True)
    for name, data in [
        ("a.safetensors", b"1"),
        ("a.safetensors", b"2"),
        ("config.json", b"{}"),
        ("sub/b.safetensors", b""),
    ]:
        (folder / name).write_bytes(data)
        settle()
        seen.add(folder_hash(cache, folder))
    (folder / "README.md").write_bytes(b"words")
    assert folder_hash(Cache(tmp_path / "cache"), folder) in seen and len(seen) == 4
    with pytest.raises(FileGone, match="no model component"):
        folder_hash(cache, tmp_path / "none")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system decides")
def test_what_was_read_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 MiB are read; a cache that never gives pages back shows that the count would tell."""
    cache = Cache(tmp_path)
    for number in range(128):
        cache.put(key(number), {"mean": torch.full((64, 32, 64), float(number)).half()})
    cache.close()

    def stacked(reader: Cache, located: Located, rows: Rows) -> Tensor:
        found = reader.stack(located, rows, ["mean", "std"])
        assert found.keys() == {"mean"}
        return found["mean"]

    def each(reader: Cache, located: Located, rows: Rows) -> Tensor:
        found = torch.stack([reader.read(located, row)["mean"] for row in rows.tolist()])
        reader.let_go()
        return found

    def grown(read: Callable[[Cache, Located, Rows], Tensor]) -> int:
        reader = Cache(tmp_path)
        located = reader.locate([key(n) for n in range(128)])
        read(reader, located, np.arange(1))
        before = resident_files()
        for start in range(0, 128, 16):
            assert read(reader, located, np.arange(start, start + 16))[3, 0, 0, 0] == start + 3
        return resident_files() - before

    assert grown(stacked) < 8 << 20 and grown(each) < 8 << 20
    monkeypatch.setattr(shards, "READS_HELD", 10**9)
    assert grown(each) > 24 << 20
    assert grown(stacked) < 8 << 20  # whatever is held: copies are not made from mappings


def test_entries_are_stacked_however_they_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the system's calls, whether the files are in memory or not, though they can't say, with
    fewer files open than there are, and from mappings alone."""
    cache = Cache(tmp_path)
    for number in range(12):
        cache.put(key(number), entry(number, size=3000))
        if number % 4 == 3:
            cache.flush()
    cache.close()
    rows = np.array([11, 3, 0, 7, 5, 4, 11])
    names = [key(n) for n in range(12)]
    means = torch.stack([entry(n, size=3000)["mean"] for n in rows.tolist()])

    def right() -> bool:
        reader = Cache(tmp_path)
        return torch.equal(reader.stack(reader.locate(names), rows, ["mean"])["mean"], means)

    assert right()
    for path in tmp_path.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if sys.platform == "linux":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert right()
    with monkeypatch.context() as patched:
        patched.setattr(shards, "OPEN", 1)
        assert right()
        patched.setattr(os, "RWF_NOWAIT", 1 << 20, raising=False)  # a flag that no system knows
        assert right()
        patched.setattr(sys, "platform", "none")
        assert right()
    with monkeypatch.context() as patched:
        patched.setattr(shards, "_File", Mock(side_effect=OSError(errno.EMFILE, "too many")))
        assert right()


def test_shards_that_change_while_they_are_used(tmp_path: Path) -> None:
    """Removed ones stay readable; one that is cut off is an error and not the process's end."""
    cache = Cache(tmp_path)
    cache.put(key(1), entry(1, size=3000))
    cache.close()
    readers = [Cache(tmp_path) for _ in range(2)]
    located = [reader.locate([key(1)]) for reader in readers]
    (path,) = tmp_path.rglob("*.safetensors")
    content = path.read_bytes()
    path.unlink()
    found = readers[0].stack(located[0], np.arange(1), ["mean"])["mean"]
    assert torch.equal(found[0], entry(1, size=3000)["mean"])
    path.write_bytes(content[:5000])
    with pytest.raises(ShardDamaged, match=rf"{path.name}.*shorter"):
        readers[1].stack(located[1], np.arange(1), ["mean"])


def resident_files() -> int:
    """Bytes of mapped files that are in this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))
