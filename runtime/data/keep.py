"""What lies in a cache, who uses it, what is damaged, and what may go. Needs no torch.

All is told and removed by whole shards. Rows go first and files after them, so that a kill between
the two leaves a file without rows, which `sweep` removes later. What a run that is at work uses
stays, and so does what was made in the last hour.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from attrs import frozen

from runtime.data.store import SHARDS, Store
from runtime.files import PARTIAL
from runtime.folder import is_held

ORPHAN_SECONDS = 3600.0
"""Files without rows, and shards, are removed when they are this old: their writer may still be at
work."""

_USED_SINCE = "SELECT shard FROM uses WHERE used >= ?"


@frozen(kw_only=True)
class Use:
    """One run that read a shard."""

    run: str  # its folder
    used: float  # seconds since 1970, the last time
    working: bool = False  # it is at work now


@frozen(kw_only=True)
class Shard:
    """One file of a cache."""

    number: int
    name: str
    bytes: int
    written: float  # seconds since 1970
    entries: int
    uses: tuple[Use, ...] = ()  # by runs whose folder is still there

    @property
    def last(self) -> float:
        """When it was written or last used."""
        return max([self.written, *(use.used for use in self.uses)])


def shards(store: Store) -> list[Shard]:
    """All shards, the oldest first. Raises CacheDamaged."""
    counts = dict(
        store.rows("SELECT shard, count(*) FROM entries WHERE 1 IN (?) GROUP BY shard", [1])
    )
    uses: dict[int, list[Use]] = {}
    noted = _uses(store)
    working = {run: is_held(Path(run)) for run, _, _ in noted if Path(run).is_dir()}
    for run, shard, used in noted:
        if run in working:
            uses.setdefault(shard, []).append(Use(run=run, used=used, working=working[run]))
    rows = store.rows("SELECT id, name, bytes, written FROM shards WHERE 1 IN (?)", [1])
    found = [
        Shard(
            number=number,
            name=name,
            bytes=size,
            written=written,
            entries=counts.get(number, 0),
            uses=tuple(uses.get(number, ())),
        )
        for number, name, size, written in rows
    ]
    return sorted(found, key=lambda shard: (shard.written, shard.number))


class Kept(Protocol):
    """What a cache keeps as one: a shard, or a copy."""

    @property
    def bytes(self) -> int:
        """On the disk."""
        ...

    @property
    def written(self) -> float:
        """Seconds since 1970."""
        ...

    @property
    def last(self) -> float:
        """When it was written or last used."""
        ...

    @property
    def uses(self) -> tuple[Use, ...]:
        """By runs whose folder is still there."""
        ...


_K = TypeVar("_K", bound=Kept)


def disposable(
    every: Sequence[_K],
    now: float,
    *,
    older: float | None = None,
    unused: bool = False,
    size: int | None = None,
) -> list[_K]:
    """Those to remove: neither written nor used for `older` seconds, used by no run that is still
    there, and, the longest unused first, what is too much for `size` bytes. Never what a run that
    is at work uses."""
    settled = [
        shard
        for shard in every
        if now - shard.written >= ORPHAN_SECONDS and not any(use.working for use in shard.uses)
    ]
    chosen = [
        shard
        for shard in settled
        if (older is not None and now - shard.last >= older) or (unused and not shard.uses)
    ]
    if size is not None:
        left = sum(shard.bytes for shard in every) - sum(shard.bytes for shard in chosen)
        known = {id(shard) for shard in chosen}
        for shard in sorted(settled, key=lambda shard: shard.last):
            if left > size and id(shard) not in known:
                chosen.append(shard)
                left -= shard.bytes
    return chosen


def remove(store: Store, chosen: Sequence[Shard], looked: float) -> list[Shard]:
    """Remove shards and all that they hold, but for those that a run has begun to use since the
    moment `looked`, when they were chosen; those that were removed. Raises CacheNotWritable."""
    with store.writing() as database:
        again = {shard for (shard,) in database.execute(_USED_SINCE, (looked,))}
        gone = [each for each in chosen if each.number not in again]
        database.execute("CREATE TEMP TABLE IF NOT EXISTS gone (id INTEGER PRIMARY KEY)")
        database.execute("DELETE FROM gone")
        database.executemany("INSERT INTO gone VALUES (?)", [(each.number,) for each in gone])
        for table, column in (("entries", "shard"), ("uses", "shard"), ("shards", "id")):
            database.execute(f"DELETE FROM {table} WHERE {column} IN (SELECT id FROM gone)")
    with store.explained():
        for shard in gone:
            (_folder(store) / shard.name).unlink(missing_ok=True)
    return gone


def sweep(store: Store) -> list[str]:
    """Remove files that no row points at, left by writers killed long ago; their names."""
    removed: list[str] = []
    folder = _folder(store)
    if not folder.is_dir():
        return removed
    with store.writing() as database:
        known = {name for (name,) in database.execute("SELECT name FROM shards")}
        for path in sorted(folder.iterdir()):
            old = time.time() - path.stat().st_mtime > ORPHAN_SECONDS
            if old and (path.name.startswith(PARTIAL) or path.name not in known):
                path.unlink(missing_ok=True)
                removed.append(path.name)
    return removed


def damaged(store: Store) -> list[str]:
    """Names of shards whose content is not what was written, or that are gone; reads all."""
    rows = store.rows("SELECT name, sha256 FROM shards WHERE 1 IN (?)", [1])
    return sorted(name for name, digest in rows if _digest(_folder(store) / name) != digest)


def _uses(store: Store) -> list[tuple[str, int, float]]:
    try:
        return list(store.rows("SELECT run, shard, used FROM uses WHERE 1 IN (?)", [1]))
    except sqlite3.OperationalError:  # a cache of a version that did not note them
        return []


def _folder(store: Store) -> Path:
    return store.path.parent / SHARDS


def _digest(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except FileNotFoundError:
        return b""
