"""SHA-256 of files and of what lies in containers, remembered by path, place, length and times, so
that each is read once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from attrs import astuple

from compiler.data.manifest import Item
from compiler.data.scan import ALONE, shown
from compiler.data.stamp import Stamp
from runtime.data.items import name_of, read, reading_order
from runtime.data.store import CacheNotWritable, Store
from runtime.data.streams import known_hash
from runtime.errors import RunFailed

if TYPE_CHECKING:
    from runtime.data.cache import Cache

_CHUNK = 1000  # files hashed between two commits
_PARTS = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")
"""What a component's folder is made of: weights, configuration, vocabulary, and the form of
conversations."""


class FileGone(RunFailed):
    """A file that the plan counts can't be read any more."""


def file_hashes(cache: Cache, paths: Sequence[str], workers: int = 1) -> list[bytes]:
    """SHA-256 of each file; only those that changed since the last time are read.

    Raises FileGone where a file can't be read.
    """
    return item_hashes(cache, [Item(file=path) for path in paths], workers)


def item_hashes(cache: Cache, items: Sequence[Item], workers: int = 1) -> list[bytes]:
    """SHA-256 of each item's bytes; only what changed since the last time is read.

    Raises FileGone where one can't be read.
    """
    order = reading_order(items, range(len(items)))
    hashes = [b""] * len(items)
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(order), _CHUNK):
            rows = order[start : start + _CHUNK]
            found = _chunk(cache, [items[row] for row in rows], pool)
            for row, digest in zip(rows, found, strict=True):
                hashes[row] = digest
    return hashes


def folder_hash(cache: Cache, folder: Path) -> str:
    """SHA-256 (hex) over names and contents of a component: weights, configuration, vocabulary.

    Raises FileGone where the folder holds nothing of the kind.
    """
    files = _parts(folder)
    if not files:
        raise FileGone(f"{folder} holds no model component", help="check the recipe's model.base")
    known = (folder, tuple(_stamp(str(file)) for file in files))
    if known not in cache.folders:
        hashes = file_hashes(cache, [str(path) for path in files])
        cache.folders[known] = _joined(folder, files, hashes)
    return cache.folders[known]


def known_hashes(store: Store, items: Sequence[Item]) -> list[bytes | None]:
    """SHA-256 of each item that is remembered and has not changed; else None. Reads no file."""
    names = [name_of(item) for item in items]
    stamps = {path: _stamp_if_there(path) for path in {item.file for item in items}}
    return _unchanged(store, names, [stamps[item.file] for item in items])


def known_folder_hash(store: Store, folder: Path) -> str | None:
    """What `folder_hash` would give, if every file's hash is remembered; else None."""
    files = _parts(folder)
    hashes = known_hashes(store, [Item(file=str(path)) for path in files])
    whole = [digest for digest in hashes if digest is not None]
    return _joined(folder, files, whole) if files and len(whole) == len(files) else None


def _parts(folder: Path) -> list[Path]:
    """The files that make a component what it is."""
    return sorted(p for p in folder.glob("**/*") if p.suffix in _PARTS and p.is_file())


def _joined(folder: Path, files: Sequence[Path], hashes: Sequence[bytes]) -> str:
    state = hashlib.sha256()
    for file, digest in zip(files, hashes, strict=True):
        state.update(os.fsencode(file.relative_to(folder).as_posix()) + b"\0" + digest)
    return state.hexdigest()


def _unchanged(
    store: Store, names: Sequence[bytes], stamps: Sequence[Stamp | None]
) -> list[bytes | None]:
    """The remembered hash of each name that has its stamp still."""
    query = "SELECT path, bytes, mtime_ns, ctime_ns, sha256 FROM files WHERE path IN (?)"
    known = {row[0]: row[1:] for row in store.rows(query, names)}
    unknown = (None,) * 4
    parts = {stamp: astuple(stamp) for stamp in set(stamps) if stamp is not None}
    found = (known.get(name, unknown) for name in names)
    return [
        row[3] if stamp is not None and row[:3] == parts[stamp] else None
        for row, stamp in zip(found, stamps, strict=True)
    ]


def _chunk(cache: Cache, items: Sequence[Item], pool: ThreadPoolExecutor) -> list[bytes]:
    names = [name_of(item) for item in items]
    looked = {path: _stamp(path) for path in {item.file for item in items}}
    stamps = [looked[item.file] for item in items]
    known = _unchanged(cache.store, names, stamps)
    if None not in known:
        return cast(list[bytes], known)
    made = pool.map(_hash, [item for item, old in zip(items, known, strict=True) if old is None])
    found = [next(made) if old is None else old for old in known]
    rows = [
        (name, stamp.bytes, stamp.mtime_ns, stamp.ctime_ns, digest)
        for name, stamp, digest, old in zip(names, stamps, found, known, strict=True)
        if old is None and stamp.settled
    ]
    if rows:
        with suppress(CacheNotWritable), cache.store.writing() as database:  # it costs only time
            database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows)
    return found


def _stamp_if_there(path: str) -> Stamp | None:
    try:
        return Stamp.of(os.stat(path))
    except OSError:
        return None


def _stamp(path: str) -> Stamp:
    try:
        return Stamp.of(os.stat(path))
    except OSError as error:
        raise _gone(path, error) from error


def _hash(item: Item) -> bytes:
    try:
        if item.at != ALONE:
            if (told := known_hash(item.file, item.at, item.column)) is not None:
                return told
            return hashlib.sha256(read(item)).digest()
        with open(item.file, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise _gone(item.file, error) from error


def _gone(path: str, error: OSError) -> FileGone:
    return FileGone(
        f"{shown(path)} can't be read: {error.strerror or error}",
        help="it was there when the recipe was planned; put it back, or run the recipe again",
    )
