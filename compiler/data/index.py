"""What is known of files' headers, so that an unchanged file is never opened again.

Of a container (a tar, a Parquet shard, a table) it is the listing of all that it holds, under what
was asked of it. One SQLite file. Reading and remembering touch only memory; `save` alone writes,
because a recipe that is refused must leave nothing behind. Deleting the file costs only time, and
so does a file that is damaged, read-only or of another version.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from compiler.data.headers import Foreign, Header
from compiler.data.quick_headers import Broken, Size
from compiler.data.stamp import Stamp

HEADERS = "headers.sqlite"
"""Its name in the user's cache folder."""

_VERSION = 3  # of the tables and of what `read_header` and the readers of containers find
_TABLE = """CREATE TABLE IF NOT EXISTS headers (
    path BLOB PRIMARY KEY, bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER,
    width INTEGER, height INTEGER, why TEXT) WITHOUT ROWID"""
_LISTINGS = """CREATE TABLE IF NOT EXISTS listings (
    path BLOB, asked TEXT, bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, listing BLOB,
    PRIMARY KEY (path, asked))"""
_PATIENCE = 30.0  # seconds to wait for another process that writes

Row = tuple[int, int, int, int, int, str]
Times = tuple[int, int, int]


def inside(container: str, at: int) -> bytes:
    """The name of what lies at a place in a container; no file can have it."""
    return os.fsencode(container) + b"\0%d" % at


class Index:
    """Headers by absolute path and stamp, kept in the SQLite file at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[bytes, Row] = {}
        self._pending: dict[bytes, Row | None] = {}
        self._listings: dict[tuple[bytes, str], tuple[Times, bytes]] = {}

    def load(self, folder: str) -> None:
        """Read all that is known below `folder` (absolute) into memory, in place of what was."""
        start = os.fsencode(folder.rstrip(os.sep) + os.sep)
        self._known = {}
        with suppress(sqlite3.Error), self._open("ro") as database:
            self._known = {} if database is None else _rows(database, start)

    def find(self, path: str, stamp: Stamp) -> Header | None:
        """The header of a loaded file if it is unchanged."""
        row = self._known.get(os.fsencode(path))
        if row is None or row[:3] != (stamp.bytes, stamp.mtime_ns, stamp.ctime_ns):
            return None
        return _header(row)

    def remember(self, path: str, stamp: Stamp, header: Header) -> None:
        """Keep a header for `save`; not that of a file that changes at this moment."""
        if stamp.settled:
            self._pending[os.fsencode(path)] = _row(stamp, header)

    def forget_missing(self, seen: set[bytes]) -> None:
        """Drop loaded files that are not among `seen` (encoded paths)."""
        gone = (name for name in self._known.keys() - seen if b"\0" not in name)
        self._pending.update(dict.fromkeys(gone))

    def condemn(self, path: str, why: str, at: int = -1) -> bool:
        """Write at once that the pixels of `path`, or of what lies at a place in it, can't be
        decoded; the next plan will name it."""
        stamp = Stamp.of(os.stat(path))
        path = os.path.abspath(path)
        name = os.fsencode(path) if at < 0 else inside(path, at)
        self._pending[name] = _row(stamp, Broken(why))
        return self.save()

    def condemned(self, path: str, stamp: Stamp) -> dict[int, str]:
        """Of an unchanged container: what is wrong with what lies at which place."""
        start = os.fsencode(path) + b"\0"
        with suppress(sqlite3.Error), self._open("ro") as database:
            rows = {} if database is None else _rows(database, start)
            known = (stamp.bytes, stamp.mtime_ns, stamp.ctime_ns)
            return {int(n[len(start) :]): row[5] for n, row in rows.items() if row[:3] == known}
        return {}

    def listing(self, path: str, asked: str, stamp: Stamp) -> bytes | None:
        """What was remembered of an unchanged container under what is asked of it now."""
        name, times = os.fsencode(path), (stamp.bytes, stamp.mtime_ns, stamp.ctime_ns)
        if (name, asked) in self._listings:
            known, listing = self._listings[name, asked]
            return listing if known == times else None
        query = (
            "SELECT listing FROM listings WHERE path = ? AND asked = ? "
            "AND bytes = ? AND mtime_ns = ? AND ctime_ns = ?"
        )
        with suppress(sqlite3.Error), self._open("ro") as database:
            if database is not None:
                found = database.execute(query, (name, asked, *times)).fetchone()
                return None if found is None else bytes(found[0])
        return None

    def remember_listing(self, path: str, asked: str, stamp: Stamp, listing: bytes) -> None:
        """Keep a container's listing for `save`; not that of a file that changes now."""
        if stamp.settled:
            times = (stamp.bytes, stamp.mtime_ns, stamp.ctime_ns)
            self._listings[os.fsencode(path), asked] = (times, listing)

    def save(self) -> bool:
        """Write what was remembered; False where that can't be (it costs only time)."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._open("rwc") as database:
                assert database is not None, "a writable index is made where there is none"
                _store(database, self._pending, self._listings)
        except (OSError, sqlite3.Error):
            return False
        self._pending, self._listings = {}, {}
        return True

    @contextmanager
    def _open(self, mode: Literal["ro", "rwc"]) -> Iterator[sqlite3.Connection | None]:
        """A connection; None where there is nothing to read."""
        database = _connect(self._path, mode)
        if database is None and mode == "rwc":
            self._path.unlink()  # damaged: a cache, not a document
            database = _connect(self._path, mode)
        if database is None:
            yield None
            return
        with closing(database):
            yield database


def _connect(path: Path, mode: Literal["ro", "rwc"]) -> sqlite3.Connection | None:
    """A connection to a file of this version; None where it is damaged or, to read, not there.

    Raises sqlite3.OperationalError where a file can't be made or is locked for too long.
    """
    if mode == "ro" and not path.exists():
        return None
    uri = f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}"
    database = sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None)
    try:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version != _VERSION and mode == "rwc":
            database.execute("DROP TABLE IF EXISTS headers")
            database.execute("DROP TABLE IF EXISTS listings")
            database.execute(_TABLE)
            database.execute(_LISTINGS)
            database.execute(f"PRAGMA user_version = {_VERSION}")
            version = _VERSION
    except sqlite3.OperationalError:
        database.close()
        raise
    except sqlite3.DatabaseError:
        version = None
    if version == _VERSION:
        return database
    database.close()
    return None


def _rows(database: sqlite3.Connection, start: bytes) -> dict[bytes, Row]:
    end = start[:-1] + bytes((start[-1] + 1,))
    query = "SELECT path, bytes, mtime_ns, ctime_ns, width, height, why FROM headers"
    found = database.execute(f"{query} WHERE path >= ? AND path < ?", (start, end))
    return {row[0]: row[1:] for row in found}


def _store(
    database: sqlite3.Connection,
    pending: dict[bytes, Row | None],
    listings: dict[tuple[bytes, str], tuple[Times, bytes]],
) -> None:
    gone = [(path,) for path, row in pending.items() if row is None]
    kept = [(path, *row) for path, row in pending.items() if row is not None]
    database.execute("BEGIN IMMEDIATE")
    database.executemany("DELETE FROM headers WHERE path = ?", gone)
    database.executemany("INSERT OR REPLACE INTO headers VALUES (?, ?, ?, ?, ?, ?, ?)", kept)
    made = [(*name, *times, listing) for name, (times, listing) in listings.items()]
    database.executemany("INSERT OR REPLACE INTO listings VALUES (?, ?, ?, ?, ?, ?)", made)
    database.execute("COMMIT")


def _row(stamp: Stamp, header: Header) -> Row:
    times = (stamp.bytes, stamp.mtime_ns, stamp.ctime_ns)
    if isinstance(header, Size):
        return (*times, header.width, header.height, "")
    return (*times, 0, 0, header.why if isinstance(header, Broken) else "")


def _header(row: Row) -> Header:
    *_, width, height, why = row
    if width:
        return Size(width, height)
    return Broken(why) if why else Foreign()
