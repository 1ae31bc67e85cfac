"""Runs a locked plan in a process of its own, and interrupts it where a test wants it.

    python -m tests.runtime.run_plan LOCK MANIFEST [--at EVENT COUNT SIGNAL]

EVENT is "step", "advance", "phase:NAME" or "sync" (a file or folder reaching the disk); at its
COUNT-th occurrence the process sends itself SIGNAL. Exit codes as the command line's.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from compiler import lock
from compiler.data.manifest import Manifest
from compiler.plan import Plan
from runtime import files
from runtime.errors import RunFailed
from runtime.events import Silent
from runtime.execute import execute


class Interrupting(Silent):
    """Sends a signal to its own process at the n-th event of a kind."""

    def __init__(self, event: str, count: int, number: int) -> None:
        self.event, self.left, self.number = event, count, number
        self.texts: list[str] = []

    def _seen(self, event: str) -> None:
        if event == self.event:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)

    def phase(self, name, total, unit):
        self._seen(f"phase:{name}")

    def advance(self, done, **values):
        self._seen("advance")

    def step(self, metrics):
        self._seen("step")

    def message(self, text, level="info"):
        self.texts.append(text)


def run(plan: Plan, manifest: Manifest, events: Interrupting) -> int:
    """Execute and return the exit code: 0 finished, 1 failed, 130 stopped."""
    synced = files.sync

    def sync(path: Path) -> None:
        synced(path)
        events._seen("sync")

    files.sync = sync
    try:
        outcome = execute(plan, manifest, events)
    except RunFailed as error:
        print(f"failed: {error.message}\n{error.help}")
        return 1
    finally:
        files.sync = synced
    print(outcome.status, outcome.step, outcome.result)
    return 130 if outcome.status == "stopped" else 0


def main(arguments: list[str]) -> int:
    """See the module."""
    torch.set_num_threads(1)
    plan, manifest = lock.read(Path(arguments[0])), Manifest.load(Path(arguments[1]))
    event, count, name = arguments[3:] if len(arguments) > 2 else ("", "0", "SIGTERM")
    return run(plan, manifest, Interrupting(event, int(count), signal.Signals[name]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
