"""The run folder: made, locked, compared with the plan, and known to be finished or not."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from compiler import lock
from compiler.adapters import RESULTS
from compiler.plan import Plan, lock_path
from runtime import files
from runtime.errors import InUse, PlanChanged, RunFailed
from runtime.result_step import RESULT
from runtime.speeds import METRICS

MEASURED = "measured.json"
RUNG = "rung.json"
"""With what the run went down the ladder, when its device ran out of memory."""
LOCK = ".lock"
ACCEPTED = ".accepted"
"""A plan, with its recipe, that a person lets a begun run go on with although it trains otherwise.
It takes the place of the run's own once a checkpoint has been loaded under it, so that one which
can't be gone on with leaves the run as it was."""
ASKING_SECONDS = 1.0  # `is_held` has a folder for an instant: a run waits that long for it


@contextmanager
def opened(plan: Plan, recipe: str) -> Iterator[Path]:
    """The plan's run folder, made if need be, with `recipe.toml` and `plan.lock.toml` in it.

    No other process can have it open meanwhile. Raises PlanChanged if it holds what another plan
    has trained and this one was not accepted, InUse if another process has it open, and RunFailed
    if it can't be written.
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
    until = time.monotonic() + ASKING_SECONDS
    while True:
        try:
            return _lock(descriptor)
        except OSError as error:
            if time.monotonic() >= until:
                raise InUse(
                    f"another process is running {folder}", help="wait for it, or stop it first"
                ) from error
        time.sleep(ASKING_SECONDS / 20)


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


@contextmanager
def idle(folder: Path) -> Iterator[bool]:
    """Inside, no other process can begin the run in `folder`; False if one is running it."""
    with (folder / LOCK).open("a+b") as held:
        try:
            _lock(held.fileno())
            free = True
        except OSError:
            free = False
        yield free


def _write_lock(folder: Path, plan: Plan, recipe: str) -> None:
    path = lock_path(folder)
    if path.exists():
        if is_accepted(folder, plan):
            return
        compare(path, plan)
    files.remove_folder(folder / ACCEPTED)  # of another plan
    _write_changed(folder / "recipe.toml", recipe)
    _write_changed(path, lock.dumps(plan))


def accept(plan: Plan, recipe: str) -> None:
    """Let the run in the plan's folder go on with `plan`. Raises OSError."""
    with files.partial_folder(Path(plan.run_folder) / ACCEPTED) as place:
        (place / "recipe.toml").write_text(recipe, encoding="utf-8")
        lock_path(place).write_text(lock.dumps(plan), encoding="utf-8")


def is_accepted(folder: Path, plan: Plan) -> bool:
    """Whether the run in `folder` was let go on with `plan`, and has not yet done so."""
    try:
        return lock.read(lock_path(folder / ACCEPTED)).digest == plan.digest
    except lock.LockError:
        return False


def take_over(folder: Path) -> None:
    """Make the plan that was accepted, if one was, the run's own. A result is that of the plan
    before: it goes, and the run is no longer finished. Raises OSError."""
    accepted = folder / ACCEPTED
    if not accepted.is_dir():
        return
    for name in (MEASURED, RESULT):
        (folder / name).unlink(missing_ok=True)
    for name in RESULTS:
        files.remove_folder(folder / name)
        files.remove_folder(folder / f"{name}_ema")
    for path in (folder / "recipe.toml", lock_path(folder)):
        _write_changed(path, (accepted / path.name).read_text(encoding="utf-8"))
    files.remove_folder(accepted)


def _write_changed(path: Path, text: str) -> None:
    """Write `text` unless it is empty or there already."""
    if text and not (path.exists() and path.read_text(encoding="utf-8") == text):
        files.write_whole(path, text)


def has_trained(folder: Path) -> bool:
    """Whether there is anything that the run's plan has made, but for what it says: a checkpoint,
    metrics, pictures, a result. A run that ended while its caches were filled has nothing yet."""
    with suppress(FileNotFoundError):
        if (folder / METRICS).stat().st_size:
            return True
    made = (path for name in ("checkpoints", "samples") for path in (folder / name).glob("*"))
    if any(not path.name.startswith(files.PARTIAL) for path in made):
        return True
    results = (name for result in RESULTS for name in (result, f"{result}_ema"))
    return any((folder / name).exists() for name in (MEASURED, RUNG, *results))


def compare(path: Path, plan: Plan) -> None:
    """Raises PlanChanged if the plan locked at `path` trains otherwise than `plan`, and its run
    has begun to."""
    try:
        locked = lock.read(path)
    except lock.LockError as error:
        raise RunFailed(
            f"{path} is no plan that this version can go on with: {error}",
            help="give the run another `name`, or move that folder away",
        ) from error
    changes = tuple(
        change for change in lock.differences(locked, plan) if lock.alters(plan, change[0])
    )
    if changes and has_trained(path.parent):
        listed = "\n".join(f"  {key}: {old} -> {new}" for key, old, new in changes)
        raise PlanChanged(
            f"{path.parent} was begun with another plan; what differs:\n{listed}",
            help="give the run another `name`, or undo the change to go on with it",
            changes=changes,
        )


def read_measured(folder: Path) -> dict[str, Any] | None:
    """What a finished run measured; None if it has not finished, or the file is damaged."""
    try:
        content = json.loads((folder / MEASURED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def check_space(folder: Path, needed: int) -> None:
    """Raises RunFailed if the disk that holds `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        gib = 1 << 30
        raise RunFailed(
            f"{folder}: a checkpoint needs {needed / gib:.2f} GiB, {free / gib:.2f} GiB are free",
            help="free disk space, or set another `output`",
        )
