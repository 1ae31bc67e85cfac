"""The cache's SQLite index: one connection for reading and writing, made when first needed.

WAL journal and full synchronisation: a commit that returned survives a power cut, readers never
wait for a writer, and writers wait for each other. Nothing is created by reading.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from runtime.errors import RunFailed

FORMAT = 1
INDEX = f"cache-{FORMAT}.sqlite"
"""The index's name in the cache folder."""
SHARDS = f"shards-{FORMAT}"
"""The folder beside it that holds what was encoded."""
_PATIENCE = 60.0  # seconds to wait for another process that commits
_CHUNK = 500  # values in one query
_SHARDS = """(
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, bytes INTEGER, sha256 BLOB,
    written REAL)"""
"""The number of a shard that was removed is never given to another: whoever located entries goes on
by numbers."""
_TABLES = f"""
CREATE TABLE IF NOT EXISTS shards {_SHARDS};
CREATE TABLE IF NOT EXISTS layouts (id INTEGER PRIMARY KEY, text TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS entries (
    key BLOB PRIMARY KEY, shard INTEGER, layout INTEGER, offsets BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uses (
    run TEXT, shard INTEGER, used REAL, PRIMARY KEY (run, shard)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, sha256 BLOB)
    WITHOUT ROWID;
"""
_RENUMBERED = f"""
CREATE TABLE numbered {_SHARDS};
INSERT INTO numbered SELECT id, name, bytes, sha256, written FROM shards;
DROP TABLE shards;
ALTER TABLE numbered RENAME TO shards;
"""
"""For an index of a version that gave numbers again."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CacheNotWritable(RunFailed, OSError):
    """The cache's disk is full, or the cache can't be written to. Nothing in it is torn."""


class CacheDamaged(RunFailed):
    """The index is no database. Deleting the cache costs only time."""


class Store:
    """The SQLite file at `path`. May be used by several threads.

    One that is `traceless` leaves no file behind by reading (SQLite itself makes a journal beside
    the index). It must be closed soon: what is written meanwhile may make it raise CacheDamaged.
    """

    def __init__(self, path: Path, *, traceless: bool = False) -> None:
        self.path = path
        self.traceless = traceless
        self.lock = threading.RLock()
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None

    def rows(self, query: str, values: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Rows of `query`, in which `(?)` stands for a list of any number of `values`."""
        with self.lock:
            database = self._open_to_read()
            if database is None:
                return
            for start in range(0, len(values), _CHUNK):
                part = values[start : start + _CHUNK]
                marks = ",".join("?" * len(part))
                with self._explained():
                    found = database.execute(query.replace("(?)", f"({marks})"), part).fetchall()
                yield from found

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, committed when the block ends well. Raises CacheNotWritable."""
        with self.lock, self.explained():
            database = self._open_to_write()
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise

    @contextmanager
    def explained(self, wanted: str = "") -> Iterator[None]:
        """Turns what a disk that is full or closed to us raises inside into CacheNotWritable;
        `wanted` says what was to be written, and its size."""
        try:
            with self._explained():
                yield
        except RunFailed:
            raise
        except sqlite3.OperationalError as error:
            raise self._not_writable(str(error), "full" in str(error), wanted) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise self._not_writable(reason, error.errno in _FULL, wanted) from error

    def close(self) -> None:
        """Let go of the file."""
        with self.lock:
            for database in (self._reader, self._writer):
                if database is not None:
                    database.close()
            self._reader = self._writer = None

    def _open_to_read(self) -> sqlite3.Connection | None:
        if self._writer is not None:
            return self._writer
        if self._reader is None and self.path.exists():
            with self._explained():
                reader = self._for_reading()
                if reader.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                    self._reader = reader
                else:  # whoever made the file was killed before its tables were there
                    reader.close()
        return self._reader

    def _for_reading(self) -> sqlite3.Connection:
        """A reader; on a medium that takes no writes SQLite must be told that nothing changes."""
        if self.traceless and not self.path.with_name(f"{self.path.name}-wal").exists():
            return self._checked(self._connect("immutable=1"))
        try:
            return self._checked(self._connect("mode=ro"))
        except sqlite3.OperationalError:
            return self._checked(self._connect("immutable=1"))

    def _open_to_write(self) -> sqlite3.Connection:
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            database = self._connect("mode=rwc")
            try:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=FULL")
                _make_tables(database)
            except BaseException:
                database.close()
                raise
            self._writer = database
        return self._writer

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"file:{quote(os.fsencode(self.path.absolute()))}?{mode}"
        return sqlite3.connect(
            uri, uri=True, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
        )

    def _checked(self, database: sqlite3.Connection) -> sqlite3.Connection:
        try:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except BaseException:
            database.close()
            raise
        return database

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise CacheDamaged(
                f"the cache's index {self.path} is damaged: {error}",
                help=f"delete the folder {self.path.parent}: that costs only the time to fill it",
            ) from error

    def _not_writable(self, reason: str, full: bool, wanted: str) -> CacheNotWritable:
        folder = self.path.parent
        message = f"the cache {folder} can't be written: {reason}"
        if not full:
            help = "put the cache where it can be written: [cache] path"
            return CacheNotWritable(message, help=help)
        with suppress(OSError):
            free = f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free there"
            message += f"; {free}, to write {wanted}" if wanted else f"; {free}"
        return CacheNotWritable(
            message,
            help="free some space, or put the cache elsewhere ([cache] path), and run again: what "
            "was saved before is kept",
        )


def _make_tables(database: sqlite3.Connection) -> None:
    """Make the tables that are not there. Who raises closes the index, and nothing was made."""
    database.execute("BEGIN IMMEDIATE")
    _run(database, _TABLES)
    made = database.execute("SELECT sql FROM sqlite_master WHERE name = 'shards'").fetchone()
    if "AUTOINCREMENT" not in made[0]:
        _run(database, _RENUMBERED)
    database.execute("COMMIT")


def _run(database: sqlite3.Connection, script: str) -> None:
    """Run statements inside the transaction, which `executescript` would commit."""
    for statement in script.split(";"):
        database.execute(statement)
