"""The runtime's memory model as a person meets it: quiet, and answered from disk where possible."""

from __future__ import annotations

import gc
import os
import sys
from functools import cache
from pathlib import Path

from compiler.memory import Candidate, MemoryModel, Simulation
from runtime.memory.store import CachedMemoryModel


def memory_model(folder: Path) -> MemoryModel:
    """Simulates what it finds no answer for in `folder`; an answer found there imports no torch."""
    return CachedMemoryModel(_simulator, folder)


class _Quiet:
    """The runtime's model, with the libraries' chatter kept off the screen."""

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`."""
        from runtime.collector import collector_off

        with collector_off():
            found = self._simulate(candidate)
            gc.freeze()  # or the next collection goes through all that the libraries brought
        return found

    def _simulate(self, candidate: Candidate) -> Simulation:
        from runtime.quiet import quiet

        with quiet(Path(os.devnull)):
            return _runtime_model().simulate(candidate)


@cache
def _runtime_model() -> MemoryModel:
    """One for all candidates: what it has learned of a kernel serves the next one."""
    from runtime.memory.simulate import RuntimeMemoryModel

    return RuntimeMemoryModel()


def _simulator() -> MemoryModel:
    _announce()
    return _Quiet()


@cache
def _announce() -> None:
    """Tell once, however many recipes are simulated, why it takes a while."""
    from tuner.screen import err

    if sys.stderr.isatty():
        err("simulating the training step (once for each new step; takes seconds) ...")
