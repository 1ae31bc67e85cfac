"""Bytes on the disk in place of memory, in a file without a name: nobody else sees it, and it is
gone when its process ends, however that ends."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TypeAlias

Bytes: TypeAlias = bytes | bytearray | memoryview
Growable: TypeAlias = "array[int] | bytearray"

ALIGNED = 8
"""Each part begins at a multiple of so many bytes."""


def mapped(parts: Iterable[Bytes], folder: Path) -> list[memoryview]:
    """The parts as they lie in a nameless file in `folder`, to read only.

    Their pages are the system's to take back, and count as no one's memory while they are not read.
    Raises OSError where there can be no such file.
    """
    with TemporaryFile(dir=folder) as file:
        spans = [_written(file, part) for part in parts]
        file.flush()
        end = file.tell()
        whole = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ) if end else b""
    view = memoryview(whole)
    return [view[start : start + length] for start, length in spans]


class Growing:
    """A buffer in memory that grows, and goes on in a nameless file in `folder` when it is long;
    without a folder, or where there can be no such file, all stays in memory."""

    LIMIT = 1 << 18
    """Bytes in memory."""

    def __init__(self, held: Growable, folder: Path | None) -> None:
        self.held = held
        self.written = 0  # bytes, in the file
        self._folder = folder
        self._file: FileIO | None = None

    def relieve(self) -> None:
        """Empty what is in memory if it is long."""
        if self._folder is None or memoryview(self.held).nbytes < self.LIMIT:
            return
        try:
            if self._file is None:
                self._file = TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            self.written += _write(self._file, self.held)
        except OSError:
            self._folder = None
        else:
            del self.held[:]

    def whole(self) -> memoryview:
        """All that went in, as bytes. Nothing may be added."""
        rest = memoryview(self.held).cast("B")
        if self._file is None:
            return rest
        with self._file as file:
            try:
                file.seek(self.written)
                _write(file, rest)
                file.truncate(self.written + len(rest))
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except OSError:
                file.seek(0)
                return memoryview(file.read()[: self.written] + rest)


def _write(file: FileIO, data: Bytes | Growable) -> int:
    """All of it, and how many bytes that is."""
    left = memoryview(data).cast("B")
    count = len(left)
    while left:
        left = left[file.write(left) :]
    return count


def _written(file: IO[bytes], part: Bytes) -> tuple[int, int]:
    """(where, how many bytes)."""
    file.write(bytes(-file.tell() % ALIGNED))
    start, length = file.tell(), memoryview(part).nbytes
    file.write(part)
    return start, length
