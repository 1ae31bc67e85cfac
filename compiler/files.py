"""Reading files whose names a recipe gives: a name may lead to a device, a pipe or a huge file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

SMALL = 32 * 2**20
"""Bytes; no configuration, caption or list of prompts is larger."""


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """The bytes of a regular file; a pipe would be waited for, and a device may have no end.

    Raises OSError, also where it is no regular file or larger than `limit` bytes.
    """
    with open(path, "rb", opener=at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit >> 20} MiB")
    return content


def at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
