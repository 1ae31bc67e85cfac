"""Plain copies of compressed tars, so that pictures can be read at their place.

A copy is made when the first picture is read, in the user's cache folder, whole or not at all. It
goes by the tar's path, length and times; one of an older state is removed. Deleting copies costs
only time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from functools import lru_cache
from pathlib import Path

from attrs import astuple

from compiler.data.scan import shown
from compiler.data.sources.compressed import DAMAGED, compression, expanded
from compiler.data.stamp import Stamp
from compiler.home import default_cache
from runtime.errors import RunFailed
from runtime.files import PARTIAL, sync

UNPACKED = "unpacked"
"""The folder of copies in the user's cache folder."""
_BLOCK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_lock = threading.Lock()


def plain(path: str) -> str:
    """The path of `path`'s content: its own, or that of a copy. Raises OSError where it can't be
    read or is damaged, and RunFailed where there is no room for a copy."""
    stamp = Stamp.of(os.stat(path))
    if not _compressed(path, stamp):
        return path
    folder, name = default_cache() / UNPACKED, name_of(path)
    copy = folder / f"{name}-{_digest(repr(astuple(stamp)))}.tar"
    with _lock:  # threads ask for the same one: the first of them makes it
        if not copy.is_file():
            for old in folder.glob(f"{name}-*.tar"):
                old.unlink(missing_ok=True)
            _unpack(path, copy)
    return str(copy)


def name_of(path: str) -> str:
    """What the names of copies of the tar at `path` begin with."""
    return _digest(os.path.abspath(path))


def _unpack(path: str, copy: Path) -> None:
    partial = copy.with_name(f"{PARTIAL}{os.getpid()}-{copy.name}")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb") as file, open(partial, "wb") as target:
            shutil.copyfileobj(expanded(file, compression(file)), target, _BLOCK)
        sync(partial)
        partial.replace(copy)
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise RunFailed(
                f"there is no room to unpack {shown(path)} into {copy.parent}: {error.strerror}",
                help="free some space, put the user's cache folder elsewhere (XDG_CACHE_HOME), or "
                "unpack it to a plain .tar yourself",
            ) from error
        raise OSError(f"it can't be unpacked: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


@lru_cache(maxsize=4096)
def _compressed(path: str, stamp: Stamp) -> bool:
    with open(path, "rb") as file:
        return compression(file) != ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]
