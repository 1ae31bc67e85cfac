"""The files of a cache's folder of shards: mapped, and copied from.

A mapping costs nothing while it is not read, gives views, and stays when its file is removed. To
copy many entries out of it is dear: every 64 KiB of them are one to two page faults, by the pieces
in which the system happens to hold the file in its page cache, which is a factor of two in speed,
and the pages must be given back. So copies are made by the system: straight into place, in half the
time and about as quickly however the file is held. What is not in memory yet is asked for together,
so that a disk reads many entries at once. What can't be had so (no such calls, a file that was
removed, too many open files) is copied from the mapping.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Final, NamedTuple

import torch
from torch import Tensor

from runtime.data.pages import not_resident
from runtime.errors import RunFailed

READS_HELD = 64
"""After so many reads of mappings their pages leave this process (not the page cache). It is reads
that are counted, not bytes: to read 64 KiB the system may map as much as 2 MiB around them."""
OPEN = 4096
"""Files that are kept open at most; a quarter of those that the process may open, if that is
fewer."""


class ShardDamaged(RunFailed):
    """A shard became shorter while it was in use, or its disk can't read it."""


class _File:
    """A file that is open for reading as long as anybody holds it: it may be let go of while
    another thread reads."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.number: Final = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self, close=os.close) -> None:  # type: ignore[no-untyped-def]
        if hasattr(self, "number"):
            close(self.number)


class Part(NamedTuple):
    """Bytes of a shard, from `start` on, and where they are to be copied to."""

    shard: int
    start: int
    out: memoryview


class Shards:
    """The shards that were looked for, by number. May be used by several threads."""

    def __init__(self, lock: RLock) -> None:
        self._lock = lock
        self._paths: dict[int, Path] = {}
        self._maps: dict[int, Tensor | None] = {}
        self._opened = lru_cache(maxsize=_at_most())(self._open)
        self._touched: set[int] = set()  # mappings read since their pages were given back
        self._reads = 0  # since then

    def __contains__(self, number: int) -> bool:
        """Whether it was looked for."""
        return number in self._maps

    def add(self, number: int, path: Path, size: int) -> None:
        """Look for the shard of this number."""
        self._paths[number], self._maps[number] = path, _map(path, size)

    def whole(self, number: int) -> bool:
        """Whether the file was there, and of its full length."""
        return self._maps[number] is not None

    def forget_missing(self) -> None:
        """Those that were not whole are looked for anew."""
        self._maps = {number: shard for number, shard in self._maps.items() if shard is not None}

    def data(self, number: int) -> Tensor:
        """The bytes of a whole shard, mapped: (bytes,) uint8."""
        shard = self._maps[number]
        assert shard is not None, "what was located was mapped"
        self._touched.add(number)
        self._reads += 1
        return shard

    def copy(self, parts: Sequence[Part]) -> None:
        """Fill the places of all parts. Raises ShardDamaged."""
        late = [part for part in parts if not self._copied(part)]
        files = [self._opened(part.shard) for part in late]
        for part, file in zip(late, files, strict=True):
            if file is not None and sys.platform == "linux":
                os.posix_fadvise(file.number, part.start, len(part.out), os.POSIX_FADV_WILLNEED)
        for part, file in zip(late, files, strict=True):
            if file is None:
                self._copy_mapped(part)
            else:
                self._wait_for(file, part)

    def let_go(self) -> None:
        """What was read so far has been copied: from time to time its pages are given back."""
        with self._lock:
            if self._reads < READS_HELD:
                return
            touched, self._touched, self._reads = self._touched, set(), 0
        for number in touched:
            if (shard := self._maps[number]) is not None:
                not_resident(shard)

    def _open(self, number: int) -> _File | None:
        try:
            return _File(self._paths[number])
        except OSError:
            return None

    def _copied(self, part: Part) -> bool:
        """Whether it could be copied at once: it was in memory."""
        if sys.platform != "linux":
            self._copy_mapped(part)
            return True
        file = self._opened(part.shard)
        if file is None:
            return False
        try:
            count = os.preadv(file.number, [part.out], part.start, os.RWF_NOWAIT)
        except OSError:  # it is not there, or this disk can't say
            return False
        return count == len(part.out)

    def _wait_for(self, file: _File, part: Part) -> None:
        done = 0
        try:
            while done < len(part.out):
                count = os.preadv(file.number, [part.out[done:]], part.start + done)
                if not count:
                    raise self._damaged(part, "it became shorter")
                done += count
        except OSError as error:
            raise self._damaged(part, error.strerror or str(error)) from error

    def _copy_mapped(self, part: Part) -> None:
        data = self.data(part.shard)[part.start : part.start + len(part.out)]
        torch.frombuffer(part.out, dtype=torch.uint8).copy_(data)

    def _damaged(self, part: Part, why: str) -> ShardDamaged:
        return ShardDamaged(
            f"the cache's file {self._paths[part.shard]} can't be read: {why}",
            help="delete it and run the recipe again: what it held is made anew",
        )


def _at_most() -> int:
    if sys.platform == "win32":
        return 1
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN if allowed == resource.RLIM_INFINITY else max(1, min(OPEN, allowed // 4))


def _map(path: Path, size: int) -> Tensor | None:
    try:
        if path.stat().st_size != size:
            return None
    except FileNotFoundError:
        return None
    # private: pages are shared with other processes until one writes, which never reaches the file
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
