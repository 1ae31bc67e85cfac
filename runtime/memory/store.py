"""Keeps the memory model's answers on disk, so that a second plan needs no torch.

An answer is kept under a digest of all that it depends on: the candidate, the versions of the
libraries whose code the simulation runs, and our own source. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from attrs import fields

from compiler.memory import Candidate, MemoryModel, Simulation
from compiler.plan import Phase, digest_of, plain
from runtime.files import write_whole

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "torchao")
# What of this repository the simulation runs; relative to the folder that holds the packages.
SOURCES = (
    "runtime/batch.py",
    "runtime/build.py",
    "runtime/ema.py",
    "runtime/fused_backward.py",
    "runtime/muon.py",
    "runtime/objective.py",
    "runtime/offloaded.py",
    "runtime/optimizers.py",
    "runtime/ranks.py",
    "runtime/stand_in.py",
    "runtime/step.py",
    "runtime/families/*.py",
    "runtime/memory/*.py",
    "runtime/methods/*.py",
    "runtime/offload/*.py",
    "runtime/quantise/*.py",
    "compiler/families/*.py",
    "compiler/optimizers/*.py",
    "compiler/quantisers.py",
)
DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,  # int(inf)
    RecursionError,  # a file that is nested too deep to read
)
NO_MATTER = ("compiled",)  # of a candidate: compiled blocks are simulated like others


class CachedMemoryModel:
    """A memory model that asks another one only what `folder` has no answer to.

    `inner` makes that other one when it is first needed: only then is torch imported.
    """

    def __init__(self, inner: Callable[[], MemoryModel], folder: Path):
        self._make = inner
        self._inner: MemoryModel | None = None
        self.folder = folder

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`. A folder that can't be written only costs time."""
        path = self.folder / f"{key(candidate)}.json"
        kept = _read(path)
        if kept is not None:
            return kept
        if self._inner is None:
            self._inner = self._make()
        found = self._inner.simulate(candidate)
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(plain(found), indent=1))
        return found


def key(candidate: Candidate) -> str:
    """Digest (hex) of all that a candidate's simulation depends on."""
    given = {name: value for name, value in plain(candidate).items() if name not in NO_MATTER}
    return digest_of({"candidate": given, "libraries": _versions(), "source": _source_digest()})


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@cache
def _source_digest() -> str:
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(root.glob(pattern)):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _read(path: Path) -> Simulation | None:
    """What `path` holds; None if it is not there or damaged."""
    try:
        found = _simulation(json.loads(path.read_text(encoding="utf-8")))
    except DAMAGED:
        return None
    return found


def _simulation(tree: dict[str, Any]) -> Simulation:
    others = {"phases", "seconds"}
    counts = {
        each.name: int(tree[each.name]) for each in fields(Simulation) if each.name not in others
    }
    return Simulation(
        phases=tuple(map(_phase, tree["phases"])), seconds=float(tree["seconds"]), **counts
    )


def _phase(tree: dict[str, Any]) -> Phase:
    """Raises ValueError if the parts are not the whole, or less than nothing."""
    phase = Phase(
        name=str(tree["name"]),
        device_bytes=int(tree["device_bytes"]),
        host_bytes=int(tree["host_bytes"]),
        parts={str(name): int(part) for name, part in tree["parts"].items()},
    )
    if sum(phase.parts.values()) != phase.device_bytes:
        raise ValueError(f"phase {phase.name}: the parts do not add up")
    if min(phase.host_bytes, *phase.parts.values(), 0) < 0:
        raise ValueError(f"phase {phase.name}: a part is less than nothing")
    return phase
