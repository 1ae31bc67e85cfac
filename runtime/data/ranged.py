"""Parts of containers that lie elsewhere: of the hub, of a store that fsspec knows, on the web."""

from __future__ import annotations

import importlib
import io
import time
from functools import cache
from typing import Any

from compiler.data.scan import shown
from compiler.data.sources.remote import is_url
from compiler.data.sources.streams import Origin
from runtime.data import web
from runtime.data.stores import state, store_of
from runtime.errors import RunFailed

HF = "hf://"
_TRIES = 3
_PAUSE = 1.0  # seconds before the second try; longer before the third
_LEAST, _MOST = 64 << 10, 4 << 20  # bytes of a piece that is read ahead


class Unreachable(RunFailed):
    """What is streamed can't be fetched."""

    def __init__(self, origin: Origin, error: BaseException) -> None:
        super().__init__(
            f"`{shown(origin.url)}` can't be read: {web.why(error)}",
            help="what was cached is kept: run it again when it can be reached",
        )


def part(origin: Origin, start: int, count: int) -> bytes:
    """`count` bytes of a container, from `start` on. Raises Unreachable."""
    if count <= 0:
        return b""
    failed: BaseException | None = None
    for number in range(1 if origin.url.startswith(HF) else _TRIES):  # the hub's does it itself
        if number:
            time.sleep(_PAUSE * number)
        try:
            data = _fetch(origin, start, count)
            if len(data) != count:
                raise ValueError(f"{len(data):,} of {count:,} bytes came")
            return data
        except RunFailed:
            raise
        except Exception as error:  # each library has its own
            failed = error
            if isinstance(error, ValueError | FileNotFoundError):
                break  # an answer, and it will be the same
    assert failed is not None
    raise Unreachable(origin, failed) from failed


def _fetch(origin: Origin, start: int, count: int) -> bytes:
    if is_url(origin.url):
        return web.part(origin.url, start, count, origin.mark)
    if origin.url.startswith(HF):
        found = _hub_files().cat_file(origin.url, start, start + count, cache_type="none")
        return bytes(found)
    store, path = _unchanged(origin)
    return bytes(store.cat_file(path, start=start, end=start + count))


@cache
def _hub_files() -> Any:
    hub: Any = importlib.import_module("huggingface_hub")
    return hub.HfFileSystem()


@cache
def _unchanged(origin: Origin) -> tuple[Any, str]:
    """The store and the path, once it has said that the file is as it was."""
    store, path = store_of(origin.url)
    if origin.mark and (now := state(store.info(path))) and now != origin.mark:
        raise ValueError("it has changed since it was listed")
    return store, path


class Ranged(io.RawIOBase):
    """A container as a file that can be read anywhere. With `ahead`, small reads are served from a
    piece that is longer the longer one reads on without leaving much out."""

    def __init__(self, origin: Origin, *, ahead: bool = False) -> None:
        super().__init__()
        self._origin, self._ahead = origin, ahead
        self._at, self._start, self._piece = 0, 0, b""
        self._length = _LEAST
        self.fetched = 0  # bytes
        self.failure: Unreachable | None = None  # the last one

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As files do; before the start is the start."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._origin.bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """Bytes from the start."""
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """As files do. Raises Unreachable."""
        left = max(0, self._origin.bytes - self._at)
        count = left if size is None or size < 0 else min(size, left)
        data = self._read_ahead(count)
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """As files do. Raises Unreachable."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def held(self, start: int, count: int) -> bytes | None:
        """These bytes, if they are here already."""
        at = start - self._start
        return self._piece[at : at + count] if 0 <= at <= len(self._piece) - count else None

    def _read_ahead(self, count: int) -> bytes:
        end = self._start + len(self._piece)
        if not (self._start <= self._at and self._at + count <= end):
            if not self._ahead:
                return self._part(self._at, count)
            near = 0 <= self._at - end <= self._length or self._start <= self._at < end
            self._length = min(2 * self._length, _MOST) if near else _LEAST
            length = min(max(count, self._length), self._origin.bytes - self._at)
            self._piece = self._part(self._at, length)
            self._start = self._at
        return self._piece[self._at - self._start :][:count]

    def _part(self, start: int, count: int) -> bytes:
        try:
            data = part(self._origin, start, count)
        except Unreachable as failure:
            self.failure = failure
            raise
        self.fetched += count
        return data
