"""Saves checkpoints while training goes on.

Training stops for a copy of the state to host memory. A thread does the rest: it writes, waits for
the disk, publishes, and deletes what need not be kept. One save is under way at most; the next one
waits for it. What fails in the thread is raised in the training thread, after its next step; in
ranks that write together, in all of them after the same step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from compiler.keeping import best_of, doomed, proven
from compiler.plan import Checkpoints
from runtime import checkpoints, files
from runtime.guard import passed_over
from runtime.ranks import ALONE, Ranks
from runtime.track import rows

Write = Callable[[], Path]
"""Writes a checkpoint, of which it holds all that there is to write; returns its folder."""


class Saver:
    """Saves the checkpoints of one run, or of one rank its part of them."""

    def __init__(
        self,
        root: Path,
        rules: Checkpoints,
        metrics: Path,
        saved: Callable[[Path, int], None] = lambda folder, step: None,
        ranks: Ranks = ALONE,
        *,
        skips: bool = False,
    ) -> None:
        """Writes below `root`; `metrics` is the file by which the best one is known. `saved` is
        told of each (folder, step), in rank 0's thread. `ranks` are those that save together. For
        `skips` see `prune`."""
        self.root, self._rules, self._metrics, self._saved = root, rules, metrics, saved
        self._ranks, self._skips = ranks, skips
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = -1  # of the last save, under way or done

    def has(self, step: int) -> bool:
        """Whether `step` is saved, or about to be."""
        folder = checkpoints.folder_of(self.root, step)
        return step == self._step or checkpoints.is_complete(folder)

    def save(self, step: int, take: Callable[[], Write]) -> None:
        """Begin to save what `take` copies, once the save before is done. Raises its error."""
        self.finish()
        write = take()
        self._step = step
        self._thread = threading.Thread(target=self._work, args=(write,), name="save", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise RunFailed if a save has failed. Waits for none, unless another rank's part of it
        has failed."""
        if self._thread is None:
            return
        ended = not self._thread.is_alive()
        failed, under_way = self._ranks.any(ended and self._error is not None, not ended)
        if failed or not under_way:
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

    def _work(self, write: Write) -> None:
        leads = self._ranks.leads
        try:
            if leads and self._metrics.exists():  # a checkpoint promises those of all its steps
                files.sync(self._metrics)
            folder = write()
            if leads:
                self._saved(folder, self._step)
                prune(self.root, self._rules, self._metrics, skips=self._skips)
        except BaseException as error:
            self._error = error


def prune(root: Path, rules: Checkpoints, metrics: Path, *, skips: bool = False) -> list[Path]:
    """Delete the complete checkpoints that need not be kept; returns what went. Where bad steps may
    be passed over (`skips`), the newest stays with which a later step was good."""
    found = {checkpoints.step_of(folder): folder for folder in checkpoints.complete(root)}
    steps, good = list(found), None
    if skips and steps:
        good = proven(steps, passed_over(metrics, steps[-1]), steps[-1])
    gone = [found[step] for step in doomed(steps, rules, best(root, rules, metrics), good)]
    for folder in gone:
        files.remove_folder(folder)
    return gone


def best(root: Path, rules: Checkpoints, metrics: Path) -> int | None:
    """The step of the best complete checkpoint, by the plan's metric; None without one."""
    steps = [checkpoints.step_of(folder) for folder in checkpoints.complete(root)]
    if not (rules.best and steps):
        return None
    return best_of(rows(metrics, steps[-1]), rules.best, steps)
