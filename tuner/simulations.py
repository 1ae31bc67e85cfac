"""The runtime's memory model, kept on disk: a second plan of the same step imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from attrs import asdict

from compiler.memory import Candidate, Simulation
from compiler.plan import Phase, digest_of, plain


class KeptSimulations:
    """A `compiler.memory.MemoryModel` that simulates what it finds no answer for in `folder`.

    An answer is found by all that it depends on: the candidate, the libraries' versions, and the
    runtime's own code. Deleting the folder costs only time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def simulate(self, candidate: Candidate) -> Simulation:
        """Peak memory per phase. Raises ValueError with a sentence if the model can't be built."""
        path = self._folder / f"{key_of(candidate)}.json"
        kept = _read(path)
        if kept is None:
            kept = _simulate(candidate)
            _write(path, kept)
        return kept


def key_of(candidate: Candidate) -> str:
    """Digest (hex) of everything that a simulation depends on."""
    from runtime.machine import versions

    return digest_of([plain(candidate), versions(), _code()])


@cache
def _code() -> str:
    """Digest (hex) of the runtime's source: another step allocates otherwise."""
    import runtime

    found = hashlib.sha256()
    for place in runtime.__path__:
        for path in sorted(Path(place).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def _simulate(candidate: Candidate) -> Simulation:
    from runtime.quiet import quiet
    from tuner.screen import err

    if sys.stderr.isatty():
        err("simulating the training step (once for each new step; takes seconds) ...")
    with quiet(Path(os.devnull)):
        from runtime.memory.simulate import RuntimeMemoryModel

        return RuntimeMemoryModel().simulate(candidate)


def _read(path: Path) -> Simulation | None:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        phases = tuple(Phase(**phase) for phase in tree.pop("phases"))
        return Simulation(phases=phases, **tree)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, simulation: Simulation) -> None:
    """Keep an answer; a cache that can't be written costs only time."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(simulation)), encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
