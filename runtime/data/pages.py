"""Gives memory back: the pages of a mapped file, so that reading much does not look like using
much, and what was freed.

The system keeps them in its page cache as long as it has room; the next read finds them there.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

from torch import Tensor

_DONTNEED = 4  # MADV_DONTNEED of Linux: drop private pages, and what was written to them


def not_resident(mapped: Tensor) -> None:
    """Let go of the pages of `mapped`, all of a privately mapped file. Elsewhere than on Linux
    nothing happens: the system takes pages back when it needs them."""
    advise = _advise()
    if advise is not None and mapped.nbytes:
        advise(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(mapped.nbytes), _DONTNEED)


def trimmed() -> None:
    """Give back what was freed but lies between what is in use: planning a million samples leaves
    much of that. Elsewhere than with glibc nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


@lru_cache(maxsize=1)
def _advise() -> Any:
    return ctypes.CDLL(None, use_errno=True).madvise if sys.platform == "linux" else None
