"""A cache that is pruned while others look into it, fill it and read from it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from runtime.data.cache import Cache, CacheIncomplete
from runtime.data.feed import Feed
from runtime.data.fill import fill_latents, fill_text
from runtime.data.keep import disposable, remove, shards
from runtime.data.packed import Keys
from runtime.data.store import INDEX
from runtime.events import Silent
from runtime.folder import LOCK, is_held
from tests.runtime.data.fed import CPU, set_up
from tests.runtime.data.test_cache import entry, key, same
from tuner.cache import prune_cache
from tuner.exits import DONE

OLD_SHARDS = (
    "CREATE TABLE shards (id INTEGER PRIMARY KEY, name TEXT UNIQUE, bytes INTEGER, sha256 BLOB,"
    " written REAL)"
)  # as it was before numbers were for once
HOURS = 7200.0


def written(folder: Path, *numbers: int, run: str = "") -> None:
    """A shard of these entries."""
    cache = Cache(folder, run=run)
    for number in numbers:
        cache.put(key(number), entry(number))
    cache.close()


def hours_ago(folder: Path) -> None:
    """All that was written was written two hours ago."""
    cache = Cache(folder)
    with cache.store.writing() as database:
        database.execute("UPDATE shards SET written = written - ?", (HOURS,))
    cache.close()


def pruned(folder: Path, *, unused: bool = True, most: str = "") -> None:
    assert prune_cache(folder, older="", unused=unused, most=most, really=True) == DONE


@contextmanager
def at_work(run: Path) -> Iterator[None]:
    """Hold a run folder as a run does."""
    fcntl = pytest.importorskip("fcntl")
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("a+b") as held:
        fcntl.flock(held.fileno(), fcntl.LOCK_EX)
        assert is_held(run)
        yield


@pytest.mark.parametrize("old", [False, True])
def test_who_has_looked_never_reads_another_s_shard(tmp_path: Path, old: bool) -> None:
    """Also in an index of the version that gave a pruned shard's number again."""
    if old:
        database = sqlite3.connect(tmp_path / INDEX)
        database.execute(OLD_SHARDS)
        database.close()
    written(tmp_path, 1, 2)
    hours_ago(tmp_path)
    reader = Cache(tmp_path)
    assert reader.missing([key(1), key(2)]) == set()
    pruned(tmp_path)
    written(tmp_path, 2, 3)
    located = reader.locate([key(2), key(3)])
    assert same(reader.read(located, 0), entry(2)) and same(reader.read(located, 1), entry(3))


def test_an_old_index_keeps_what_it_has(tmp_path: Path) -> None:
    """Made over by the first who writes; who has it open goes on."""
    written(tmp_path, 1)
    written(tmp_path, 2)
    database = sqlite3.connect(tmp_path / INDEX)
    rows = database.execute("SELECT * FROM shards").fetchall()
    database.executescript(f"DROP TABLE shards; {OLD_SHARDS};")
    database.executemany("INSERT INTO shards VALUES (?, ?, ?, ?, ?)", rows)
    database.commit()
    database.close()
    reader = Cache(tmp_path)
    assert same(reader.get(key(1)), entry(1))
    written(tmp_path, 3)
    for cache in (reader, Cache(tmp_path)):
        assert cache.missing([key(n) for n in range(5)]) == {key(0), key(4)}
        assert all(same(cache.get(key(n)), entry(n)) for n in (1, 2, 3))
    assert [shard.number for shard in shards(reader.store)] == [1, 2, 3]
    assert [shard.entries for shard in shards(reader.store)] == [1, 1, 1]


def test_pruned_at_the_same_instant_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, 1, 2)
    hours_ago(tmp_path)
    looking, locating = Cache(tmp_path), Cache(tmp_path)
    for cache in (looking, locating):
        rows = cache.store.rows

        def then(query: str, values: list[object], rows=rows) -> list[object]:  # type: ignore[no-untyped-def]
            found = list(rows(query, values))
            if "FROM entries" in query:
                pruned(tmp_path)
            return found

        monkeypatch.setattr(cache.store, "rows", then)
    assert looking.missing([key(1), key(2)]) == {key(1), key(2)}
    with pytest.raises(CacheIncomplete, match="2 of 2"):
        locating.locate([key(1), key(2)])


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_a_fill_at_work_has_made_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Of hours, with the first shards more than an hour old before anything is read from them.
    What it found is noted as well as what it makes."""
    plan, manifest, family = set_up(tmp_path)
    folder, run = Path(plan.cache_folder), Path(plan.run_folder)
    cache = Cache(folder, run="" if when == "before" else plan.run_folder)
    with at_work(run):
        fill_text(plan, manifest, family, cache, Silent())
        fill_latents(plan, manifest, family, cache, Silent())
        if when == "before":  # of another run, which is no more
            cache = Cache(folder, run=plan.run_folder)
            fill_text(plan, manifest, family, cache, Silent())
            fill_latents(plan, manifest, family, cache, Silent())
        hours_ago(folder)
        with cache.store.writing() as database:
            database.execute("UPDATE uses SET used = used - ?", (HOURS,))
        pruned(folder)
        pruned(folder, most="1 B", unused=False)
        Feed(plan, manifest, family, cache, CPU).window(0)
    hours_ago(folder)
    pruned(folder, most="1 B", unused=False)  # the run has ended
    assert shards(Cache(folder).store) == []


def test_ranks_that_do_not_lead_write_nothing_by_looking(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    written(tmp_path, 1)
    keys = Keys.of([key(1), key(2)])
    cache = Cache(tmp_path, run=str(tmp_path / "run"))
    assert cache.find(keys).lacking().tolist() == [False, True]
    assert shards(cache.store)[0].uses == ()
    assert cache.find(keys, noted=True).lacking().tolist() == [False, True]
    assert [use.run for use in shards(cache.store)[0].uses] == [str(tmp_path / "run")]


def test_what_goes_before_it_is_noted_is_lacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, 1)
    hours_ago(tmp_path)
    cache = Cache(tmp_path, run=str(tmp_path))
    note = cache._note

    def late(run: str, numbers: set[int]) -> None:
        pruned(tmp_path)
        note(run, numbers)

    monkeypatch.setattr(cache, "_note", late)
    assert cache.find(Keys.of([key(1)]), noted=True).lacking().tolist() == [True]


def test_what_is_noted_before_it_goes_stays(tmp_path: Path) -> None:
    """A run begins between the look and the removal."""
    written(tmp_path, 1)
    written(tmp_path, 2)
    hours_ago(tmp_path)
    store = Cache(tmp_path).store
    every = shards(store)
    looked = every[-1].written + HOURS
    chosen = disposable(every, looked + HOURS, unused=True)
    assert len(chosen) == 2
    cache = Cache(tmp_path, run=str(tmp_path))
    cache.find(Keys.of([key(2)]), noted=True)
    assert [shard.number for shard in remove(store, chosen, looked)] == [1]
    assert Cache(tmp_path).missing([key(1), key(2)]) == {key(1)}
    assert torch.equal(cache.get(key(2))["mean"], entry(2)["mean"])
