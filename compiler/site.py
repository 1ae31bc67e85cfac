"""What a plan's cost depends on besides the plan: this machine's disks and its own past.

`runtime.site` looks, `tuner` hands it in, the compiler only asks. None of it enters a plan.
"""

from __future__ import annotations

from typing import Protocol

from attrs import frozen

from compiler.data.manifest import Manifest
from compiler.plan import Plan


@frozen(kw_only=True)
class Space:
    """A file system. Folders of equal `disk` share their room."""

    free_bytes: int
    disk: int


@frozen(kw_only=True)
class Counted:
    """Cache entries that a run needs. What is neither cached nor unknown is to be made."""

    total: int
    cached: int
    unknown: int  # not hashed since they changed, or not looked at

    @property
    def missing(self) -> int:
        """Entries that are known not to be there."""
        return self.total - self.cached - self.unknown


@frozen(kw_only=True)
class Resume:
    """What a run folder holds of an earlier run."""

    step: int  # of the newest complete checkpoint; 0 without one
    finished: bool
    changes: tuple[tuple[str, str, str], ...]  # (key, old, new) of what alters the trajectory
    problem: str  # why nothing can go on from there; "" if it can


@frozen(kw_only=True)
class Present:
    """What is there already."""

    texts: Counted
    latents: Counted
    resume: Resume | None  # None: no run has begun there
    run_bytes: int  # of checkpoints and results that lie in the run folder


@frozen(kw_only=True)
class Speed:
    """What a device did in an earlier run."""

    flops_per_second: float
    steps: int  # that were measured


class Site(Protocol):
    """This machine, as far as costs go."""

    def space(self, folder: str) -> Space | None:
        """Of the file system that holds `folder` or would hold it; None if it can't be told."""
        ...

    def present(self, plan: Plan, manifest: Manifest) -> Present:
        """What of `plan` is cached or done. Opens no picture and writes nothing."""
        ...

    def speed(self, key: str) -> Speed | None:
        """What was measured under a key of `compiler.costs`."""
        ...
