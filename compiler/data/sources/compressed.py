"""Compressed files, read once from start to end.

gzip, bzip2 and xz by Python's own modules, zstd by pyarrow (the extra for shards). A file is told
by its first bytes, whatever its name.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from typing import IO, Any, cast

from compiler.data.sources.columns import pyarrow

HEADS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""What reading a damaged or cut-off file raises."""
_BLOCK = 1 << 20


def compression(file: IO[bytes]) -> str:
    """How `file`, which is at its start and stays there, is compressed; "" if it is not."""
    head = file.read(6)
    file.seek(0)
    return next((kind for start, kind in HEADS.items() if head.startswith(start)), "")


def expanded(file: IO[bytes], kind: str) -> IO[bytes]:
    """The content of `file`, to be read forward. Raises SourceUnfit without the package for it."""
    match kind:
        case "gzip":
            return cast(IO[bytes], gzip.GzipFile(fileobj=file))
        case "bzip2":
            return bz2.BZ2File(file)
        case "xz":
            return lzma.LZMAFile(file)
    pa = pyarrow()
    return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))


class Forward(io.RawIOBase):
    """A stream that is read once: it goes forward by reading, and back no further than the last
    block that was read."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream, self._at, self._end, self._last = stream, 0, 0, b""

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Forward."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """To `offset` from the start. Raises OSError where that lies too far back."""
        assert whence == io.SEEK_SET, "nobody knows where it ends"
        if offset < self._end - len(self._last):
            raise OSError("a compressed file can't be read backwards")
        self._at = min(offset, self._end)
        while self._at < offset and self.read(min(_BLOCK, offset - self._at)):
            pass
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As files do."""
        if self._at < self._end:
            data = self._last[self._at - self._end :][: len(buffer)]
        else:
            data = self._stream.read(len(buffer))
            self._end += len(data)
            self._last = data or self._last
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
