"""Many keys and rows in few bytes: there may be millions of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from compiler.data.manifest import Manifest

KEY_BYTES = 32
TOGETHER = 20_000
"""Samples that are looked at as objects at a time, so that what that takes stays small."""

Rows = NDArray[np.int64]


class Keys(Sequence[bytes]):
    """Keys of the cache, one behind the other."""

    def __init__(self, count: int = 0) -> None:
        """`count` keys to be set."""
        self._data = bytearray(count * KEY_BYTES)

    @classmethod
    def of(cls, keys: Iterable[bytes]) -> Keys:
        """Keys in the order in which they come."""
        found = cls()
        for key in keys:
            found._data += key
        return found

    def __len__(self) -> int:
        return len(self._data) // KEY_BYTES

    @overload
    def __getitem__(self, number: int) -> bytes: ...
    @overload
    def __getitem__(self, number: slice) -> list[bytes]: ...
    def __getitem__(self, number: int | slice) -> bytes | list[bytes]:
        if isinstance(number, slice):
            start, stop, step = number.indices(len(self))
            if step != 1:
                return [self[each] for each in range(start, stop, step)]
            part = bytes(memoryview(self._data)[start * KEY_BYTES : stop * KEY_BYTES])
            return [part[at : at + KEY_BYTES] for at in range(0, len(part), KEY_BYTES)]
        start = range(len(self))[number] * KEY_BYTES
        return bytes(self._data[start : start + KEY_BYTES])

    def __setitem__(self, number: int, key: bytes) -> None:
        assert len(key) == KEY_BYTES, "the length of the buffer is that of all keys"
        start = range(len(self))[number] * KEY_BYTES
        self._data[start : start + KEY_BYTES] = key

    def __eq__(self, other: object) -> bool:
        return self._data == other._data if isinstance(other, Keys) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # they can be set

    def firsts(self, rows: Rows) -> Rows:
        """Those of `rows`, in their order, whose key none before them has."""
        words = np.frombuffer(self._data, np.uint64).reshape(-1, KEY_BYTES // 8)
        order = np.argsort(words[rows, 0], kind="stable")  # equal keys stay in order, and together,
        new, twins = self._compared(words, rows, order)
        if new[twins].any():  # unless others begin with the same eight bytes
            order = np.lexsort(words[rows].T)
            new, _ = self._compared(words, rows, order)
        found: Rows = rows[np.sort(order[new])]
        return found

    @staticmethod
    def _compared(
        words: NDArray[np.uint64], rows: Rows, order: Rows
    ) -> tuple[NDArray[np.bool_], Rows]:
        """Whether each key differs from the one before it; and those that begin like that one."""
        first = words[rows[order], 0]
        new = np.ones(len(order), bool)
        new[1:] = first[1:] != first[:-1]
        twins: Rows = np.flatnonzero(~new)
        there, before = words[rows[order[twins]]], words[rows[order[twins - 1]]]
        new[twins] = (there != before).any(axis=1)
        return new, twins


def spans(count: int) -> Iterator[slice]:
    """`count` samples, `TOGETHER` at a time."""
    return (slice(at, min(at + TOGETHER, count)) for at in range(0, count, TOGETHER))


def reading_order(manifest: Manifest, rows: Rows | None = None) -> Rows:
    """Rows (without any all of them) by the file that they lie in and their place there; those that
    are files of their own come first and stay as they are."""
    file, at = (np.frombuffer(column, dtype) for column, dtype in _typed(manifest))
    if rows is not None:
        return rows[np.lexsort((at[rows], file[rows]))]
    return np.lexsort((at, file)) if file.any() else np.arange(len(file))


def _typed(manifest: Manifest) -> Iterator[tuple[memoryview, type[np.number]]]:
    file, at = manifest.positions()
    yield memoryview(file), np.uint32
    yield memoryview(at), np.int64
