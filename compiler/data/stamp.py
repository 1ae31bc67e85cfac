"""What tells that a file is unchanged without opening it."""

from __future__ import annotations

import os
import time

from attrs import frozen

_SETTLED_NS = 100_000_000  # a clock tick of every common file system, with room


@frozen(slots=True)
class Stamp:
    """Length and times of a file. The change time is there because copying tools set the other
    one back: a file replaced by another of equal length and age is still noticed."""

    bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp in a file's status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def settled(self) -> bool:
        """Whether a later change must show: false in the clock tick of the last change."""
        return time.time_ns() - max(self.mtime_ns, self.ctime_ns) > _SETTLED_NS
