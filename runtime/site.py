"""This machine, as far as a plan's costs go: disks, caches, begun runs, past speeds. No torch."""

from __future__ import annotations

import os
import shutil
from functools import cached_property
from pathlib import Path

from compiler.adapters import RESULTS
from compiler.data.manifest import Manifest
from compiler.plan import Plan, lock_path
from compiler.site import Present, Resume, Space, Speed
from runtime import folder, saved, speeds
from runtime.data.present import cached
from runtime.errors import PlanChanged, RunFailed


class Here:
    """Implements `compiler.site.Site`; `cache` is the user's cache folder. Writes nothing."""

    def __init__(self, cache: Path) -> None:
        self._speeds = cache / speeds.SPEEDS

    def space(self, folder: str) -> Space | None:
        """See `Site.space`."""
        try:
            place = existing(Path(folder))
            return Space(free_bytes=shutil.disk_usage(place).free, disk=os.stat(place).st_dev)
        except OSError:
            return None

    def present(self, plan: Plan, manifest: Manifest) -> Present:
        """See `Site.present`."""
        texts, latents = cached(plan, manifest)
        place = Path(plan.run_folder)
        return Present(
            texts=texts,
            latents=latents,
            resume=resume(plan),
            run_bytes=sum(_bytes_below(place / name) for name in ("checkpoints", *RESULTS)),
        )

    def speed(self, key: str) -> Speed | None:
        """See `Site.speed`."""
        return self._known.get(key)

    @cached_property
    def _known(self) -> dict[str, Speed]:
        return speeds.read(self._speeds)


def resume(plan: Plan) -> Resume | None:
    """What the plan's run folder would be gone on from; None where no run has begun."""
    place = Path(plan.run_folder)
    locked = lock_path(place)
    if not locked.exists():
        return None
    changes: tuple[tuple[str, str, str], ...] = ()
    problem = ""
    try:
        folder.compare(locked, plan)
    except PlanChanged as error:
        changes = error.changes
    except RunFailed as error:
        problem = error.message
    newest = saved.latest(place / "checkpoints")
    done = any((place / name).is_dir() for name in RESULTS)
    return Resume(
        step=int(saved.read_state(newest)["step"]) if newest else 0,
        finished=done and folder.read_measured(place) is not None,
        changes=changes,
        problem=problem,
    )


def existing(place: Path) -> Path:
    """The nearest folder that is there already."""
    place = place.absolute()
    return next(path for path in (place, *place.parents) if path.exists())


def _bytes_below(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
