"""The runtime's memory model as a person meets it: quiet, and answered from disk where possible."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.memory.apart import Apart

if TYPE_CHECKING:
    from compiler.memory import Candidate, MemoryModel, Simulation

SIMULATIONS = "simulations"  # folder of answers, below the cache's
PLANNED = "planned"  # below it: an empty file for each recipe that was planned


def memory_model(folder: Path, simulator: MemoryModel | None = None) -> MemoryModel:
    """Simulates what it finds no answer for in `folder`, by `simulator` or here; an answer found
    there imports no torch."""

    from runtime.memory.store import CachedMemoryModel

    def found() -> MemoryModel:
        _announce()
        return simulator or _Quiet()

    return CachedMemoryModel(found, folder)


class Planning:
    """One `recipe` planned with these further `words` of the command, answers kept in `folder`."""

    def __init__(self, folder: Path, recipe: Path, words: Sequence[str]):
        self._planned = folder / PLANNED / _digest(recipe, words)

    def simulator(self) -> AbstractContextManager[MemoryModel | None]:
        """One in a process of its own, inside. None if this was planned before: `folder` has the
        answers then."""
        return nullcontext() if self._planned.exists() else Apart(_prepared)

    def done(self) -> None:
        """There is a plan. A folder that can't be written only costs time."""
        with suppress(OSError):
            self._planned.parent.mkdir(parents=True, exist_ok=True)
            self._planned.touch()


def _digest(recipe: Path, words: Sequence[str]) -> str:
    text = b""
    with suppress(OSError):
        if recipe.is_file():  # a pipe can be read once only
            with recipe.open("rb") as file:
                text = file.read(1 << 20)
    return hashlib.sha256(b"\0".join((text, *map(os.fsencode, words)))).hexdigest()


class _Quiet:
    """The runtime's model, with the libraries' chatter kept off the screen."""

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`."""
        with _undisturbed():
            return _runtime_model().simulate(candidate)


def _prepared() -> MemoryModel:
    with _undisturbed():
        _runtime_model()
    return _Quiet()


@contextmanager
def _undisturbed() -> Iterator[None]:
    from runtime.collector import collector_off
    from runtime.quiet import quiet

    with collector_off(), quiet(Path(os.devnull)):
        yield


@cache
def _runtime_model() -> MemoryModel:
    """One for all candidates: what it has learned of a kernel serves the next one."""
    from runtime.memory.simulate import RuntimeMemoryModel

    return RuntimeMemoryModel()


@cache
def _announce() -> None:
    """Tell once, however many recipes are simulated, why it takes a while."""
    from tuner.screen import err

    if sys.stderr.isatty():
        err("simulating the training step (once for each new step; takes seconds) ...")
