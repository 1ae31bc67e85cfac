"""Saves checkpoints while training goes on.

Training stops for a copy of the state to host memory. A thread does the rest: it writes, waits for
the disk, publishes, and deletes what need not be kept. One save is under way at most; the next one
waits for it. What fails in the thread is raised in the training thread, after its next step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from compiler.keeping import best_of, doomed
from compiler.plan import Checkpoints
from runtime import checkpoints, files
from runtime.checkpoints import Snapshot
from runtime.track import rows


class Saver:
    """Saves the checkpoints of one run."""

    def __init__(
        self,
        root: Path,
        rules: Checkpoints,
        metrics: Path,
        saved: Callable[[Path, int], None] = lambda folder, step: None,
    ) -> None:
        """Writes below `root`; `metrics` is the file by which the best one is known. `saved` is
        told of each (folder, step), in the thread."""
        self._root, self._rules, self._metrics, self._saved = root, rules, metrics, saved
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = -1  # of the last save, under way or done

    def has(self, step: int) -> bool:
        """Whether `step` is saved, or about to be."""
        folder = checkpoints.folder_of(self._root, step)
        return step == self._step or checkpoints.is_complete(folder)

    def save(self, step: int, take: Callable[[], Snapshot]) -> None:
        """Begin to save what `take` copies, once the save before is done. Raises its error."""
        self.finish()
        snapshot = take()
        self._step = step
        self._thread = threading.Thread(
            target=self._work, args=(snapshot,), name="save", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise RunFailed if a save has failed; waits for none."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is under way. Raises RunFailed if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self._step = -1
            raise error

    def _work(self, snapshot: Snapshot) -> None:
        try:
            if self._metrics.exists():  # a checkpoint promises the metrics of all steps before it
                files.sync(self._metrics)
            folder = checkpoints.save(self._root, snapshot)
            self._saved(folder, snapshot.step)
            prune(self._root, self._rules, self._metrics)
        except BaseException as error:
            self._error = error


def prune(root: Path, rules: Checkpoints, metrics: Path) -> list[Path]:
    """Delete the complete checkpoints that need not be kept; returns what went."""
    found = {checkpoints.step_of(folder): folder for folder in checkpoints.complete(root)}
    gone = [found[step] for step in doomed(list(found), rules, best(root, rules, metrics))]
    for folder in gone:
        files.remove_folder(folder)
    return gone


def best(root: Path, rules: Checkpoints, metrics: Path) -> int | None:
    """The step of the best complete checkpoint, by the plan's metric; None without one."""
    steps = [checkpoints.step_of(folder) for folder in checkpoints.complete(root)]
    if not (rules.best and steps):
        return None
    return best_of(rows(metrics, steps[-1]), rules.best, steps)
