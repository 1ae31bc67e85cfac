"""The run folder: made, locked, compared with the plan, and known to be finished or not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from compiler import lock
from compiler.plan import Plan, alters_trajectory, lock_path
from runtime import files
from runtime.errors import PlanChanged, RunFailed

MEASURED = "measured.json"
LOCK = ".lock"


@contextmanager
def opened(plan: Plan, recipe: str) -> Iterator[Path]:
    """The plan's run folder, made if need be, with `recipe.toml` and `plan.lock.toml` in it.

    No other process can have it open meanwhile. Raises PlanChanged if it holds another plan, and
    RunFailed if it can't be written or is in use.
    """
    folder = Path(plan.run_folder)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context((folder / LOCK).open("a+b"))
            _hold(held.fileno(), folder)
            for place in (folder, folder / "checkpoints"):
                files.clean(place)
            _write_lock(folder, plan, recipe)
        except OSError as error:
            raise RunFailed(
                f"can't write the run folder {folder}: {error.strerror or error}",
                help="set another `output` in the recipe",
            ) from error
        yield folder


def _hold(descriptor: int, folder: Path) -> None:
    """Lock the folder; the system lets go of it when the process ends, however it ends."""
    try:
        _lock(descriptor)
    except OSError as error:
        raise RunFailed(
            f"another process is running {folder}", help="wait for it, or stop it first"
        ) from error


def _lock(descriptor: int, *, shared: bool = False) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def is_held(folder: Path) -> bool:
    """Whether a process is running the run in `folder`; makes nothing there."""
    try:
        with (folder / LOCK).open("rb") as held:
            _lock(held.fileno(), shared=True)  # let go of at once, as the file is closed
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _write_lock(folder: Path, plan: Plan, recipe: str) -> None:
    path = lock_path(folder)
    if path.exists():
        compare(path, plan)
    _write_changed(folder / "recipe.toml", recipe)
    _write_changed(path, lock.dumps(plan))


def _write_changed(path: Path, text: str) -> None:
    """Write `text` unless it is empty or there already."""
    if text and not (path.exists() and path.read_text(encoding="utf-8") == text):
        files.write_whole(path, text)


def compare(path: Path, plan: Plan) -> None:
    """Raises PlanChanged if the plan locked at `path` trains otherwise than `plan`."""
    try:
        locked = lock.read(path)
    except lock.LockError as error:
        raise RunFailed(
            f"{path} is no plan that this version can go on with: {error}",
            help="give the run another `name`, or move that folder away",
        ) from error
    changes = tuple(
        change for change in lock.differences(locked, plan) if alters_trajectory(change[0])
    )
    if changes:
        listed = "\n".join(f"  {key}: {old} -> {new}" for key, old, new in changes)
        raise PlanChanged(
            f"{path.parent} was begun with another plan; what differs:\n{listed}",
            help="give the run another `name`, or undo the change to go on with it",
            changes=changes,
        )


def read_measured(folder: Path) -> dict[str, Any] | None:
    """What a finished run measured; None if it has not finished."""
    try:
        content = json.loads((folder / MEASURED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    assert isinstance(content, dict)
    return content


def check_space(folder: Path, needed: int) -> None:
    """Raises RunFailed if the disk that holds `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        gib = 1 << 30
        raise RunFailed(
            f"{folder}: a checkpoint needs {needed / gib:.2f} GiB, {free / gib:.2f} GiB are free",
            help="free disk space, or set another `output`",
        )
