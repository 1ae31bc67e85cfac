"""The bytes of one picture, wherever they lie: a file, a place in a tar, a row of a shard.

Files and tars are read at the place itself, compressed tars from an unpacked copy, and what is
streamed where it lies. A Parquet shard
is read a row group at a time, the least that its format gives, and an Arrow shard a record batch at
a time; the last two of them are kept, so reading in the order of places (`reading_order`) reads
each about once.
"""

from __future__ import annotations

import importlib
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from attrs import frozen

from compiler.data.index import inside
from compiler.data.manifest import Item
from compiler.data.scan import ALONE
from compiler.data.sources.columns import image_kind, opened_arrow, pyarrow, validated
from compiler.data.sources.streams import origin_of
from compiler.data.stamp import Stamp
from runtime.data.ranged import Ranged, part
from runtime.data.unpacked import plain

_GROUPS = 2  # row groups or batches that are kept: one of pictures may take a GiB
_SHARDS = 64  # of which the layout is kept

_lock = threading.Lock()


def read(item: Item) -> bytes:
    """The picture's bytes. Raises OSError where they can't be read, and Unreachable where they are
    streamed and can't be fetched."""
    if item.at == ALONE:
        with open(item.file, "rb") as file:
            return file.read()
    if item.kind == "webdataset":
        if (origin := origin_of(item.file)) is not None:
            return part(origin, item.at, item.bytes)
        with open(plain(item.file), "rb") as file:
            file.seek(item.at)
            return file.read(item.bytes)
    return _cell(item)


def name_of(item: Item) -> bytes:
    """What tells this item from all others of this machine: its path, and its place there."""
    if item.at == ALONE:
        return os.fsencode(os.path.abspath(item.file))
    absolute = _normal if os.path.isabs(item.file) else os.path.abspath
    return inside(absolute(item.file), item.at)


_normal = lru_cache(maxsize=64)(os.path.normpath)  # of containers, each of which holds many


def reading_order(items: Sequence[Item], rows: Iterable[int]) -> list[int]:
    """`rows` of `items` by container and place: the order in which each is read once."""
    return sorted(rows, key=lambda row: (items[row].file, items[row].at))


@frozen
class _Layout:
    """Where the rows of a shard begin: the ends of its groups, counted from the first row."""

    ends: tuple[int, ...]
    footer: Any = None  # of a Parquet shard, so that it is read once


def _cell(item: Item) -> bytes:
    stamp = Stamp.of(os.stat(item.file))
    try:
        with _lock:  # threads ask for the same group: one of them reads it
            layout = _layout(item.file, item.kind, stamp)
            group = bisect_right(layout.ends, item.at)
            column = _group(item.file, item.kind, stamp, item.column, group)
        first = layout.ends[group - 1] if group else 0
        cell = column[item.at - first]
        if image_kind(column.type) == "struct":
            cell = cell["bytes"]
        if not cell.is_valid:
            raise OSError("there is no picture in this row any more")
        return bytes(cell.as_buffer())
    except (pyarrow().ArrowException, IndexError, KeyError) as error:
        raise OSError(f"row {item.at} of the shard can't be read: {error}") from error


@lru_cache(maxsize=_SHARDS)
def _layout(path: str, kind: str, stamp: Stamp) -> _Layout:
    if kind == "parquet":
        with _parquet(path) as file:
            footer = file.metadata
            counts = [footer.row_group(at).num_rows for at in range(footer.num_row_groups)]
        return _Layout(tuple(accumulate(counts)), footer)
    with opened_arrow(path) as (_, batches):
        return _Layout(tuple(accumulate(batch.num_rows for batch in batches)))


@lru_cache(maxsize=_GROUPS)
def _group(path: str, kind: str, stamp: Stamp, column: str, group: int) -> Any:
    """The pictures' column of one row group or record batch."""
    if kind == "parquet":
        with _parquet(path, _layout(path, kind, stamp).footer) as file:
            return file.read_row_group(group, columns=[column]).column(column)
    with opened_arrow(path) as (_, batches):
        for number, batch in enumerate(batches):
            if number == group:
                return validated(batch.column(column))
    raise IndexError(group)


def _parquet(path: str, footer: Any = None) -> Any:
    origin = origin_of(path)
    source = path if origin is None else Ranged(origin)
    return importlib.import_module("pyarrow.parquet").ParquetFile(source, metadata=footer)
