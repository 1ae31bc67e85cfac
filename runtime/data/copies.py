"""What was copied or unpacked into the user's cache folder, and which runs read it. Needs no torch.

Each run that begins is noted there by its folder; what it reads follows from the list of samples
that it keeps. What data sets of the hub were copied lies in the hub's own cache, and is left to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from compiler.data.manifest import Manifest, ManifestDamaged
from compiler.data.sources.remote import DOWNLOADS, FAILED, LATER, NOTE, PICTURES
from compiler.data.sources.spots import kind_of
from compiler.files import read_small
from runtime.data.keep import Use
from runtime.data.unpacked import UNPACKED, name_of
from runtime.files import PARTIAL, write_whole
from runtime.folder import is_held

RUNS = "runs"
"""The folder, in the user's cache folder, of notes on runs."""
MANIFEST = "manifest.jsonl"
"""The list of samples in a run folder."""

Uses = Mapping[str, tuple[Use, ...]]
"""By what a copy is called: the runs that read it."""


@frozen(kw_only=True)
class Copy:
    """One source, one picture of a table, or one tar."""

    kind: Literal["source", "image", "unpacked"]
    name: str  # as a person knows it, if it is known
    paths: tuple[Path, ...]  # in the order in which they are removed
    bytes: int
    written: float  # seconds since 1970
    uses: tuple[Use, ...] = ()  # by runs whose folder is still there

    @property
    def last(self) -> float:
        """When it was written or last used."""
        return max([self.written, *(use.used for use in self.uses)])


def note_run(run_folder: Path, root: Path) -> None:
    """Note that a run begins now. Where that can't be written, its copies count as unused."""
    name = hashlib.sha256(os.fsencode(os.path.abspath(run_folder))).hexdigest()[:24]
    told = json.dumps({"run": os.path.abspath(run_folder), "used": time.time()})
    with suppress(OSError):
        (root / RUNS).mkdir(parents=True, exist_ok=True)
        write_whole(root / RUNS / f"{name}.json", told)


def copies(root: Path) -> list[Copy]:
    """All copies in the user's cache folder `root`, the oldest first."""
    uses = _uses(root)
    found = [*_sources(root, uses), *_images(root, uses), *_unpacked(root, uses)]
    return sorted(found, key=lambda copy: (copy.written, copy.paths))


def remove(gone: Sequence[Copy]) -> None:
    """Delete copies. One that is removed in part is made whole by whoever needs it."""
    for path in (path for copy in gone for path in copy.paths):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sources(root: Path, uses: Uses) -> Iterator[Copy]:
    folder = root / DOWNLOADS
    names = {path.with_suffix("").name for path in _in(folder) if _is_source(path)}
    for name in sorted(names):
        note, place = folder / (name + NOTE), folder / name
        told = _object(note)
        if told and str(told.get("root")) != str(place):
            continue  # of the hub
        files = [Path(at, file) for at, _, files in os.walk(place) for file in files]
        if note.is_file():
            files.append(note)
        stats = [stat for path in files if (stat := _stat(path)) is not None]
        if not stats:
            continue
        yield Copy(
            kind="source",
            name=str(told.get("url") or name),
            paths=(note, place),
            bytes=sum(stat.st_size for stat in stats),
            written=max(stat.st_mtime for stat in stats),
            uses=uses.get(name, ()),
        )


def _is_source(path: Path) -> bool:
    return path.name.endswith(NOTE) or (path.is_dir() and path.name != PICTURES)


def _images(root: Path, uses: Uses) -> Iterator[Copy]:
    for folder in _in(root / DOWNLOADS / PICTURES):
        for path in _in(folder):
            if path.name.startswith(PARTIAL):
                continue
            if (stat := _stat(path)) is None:
                continue
            name = path.name.removesuffix(FAILED).removesuffix(LATER)
            yield Copy(
                kind="image",
                name=name,
                paths=(path,),
                bytes=stat.st_size,
                written=stat.st_mtime,
                uses=uses.get(name, ()),
            )


def _unpacked(root: Path, uses: Uses) -> Iterator[Copy]:
    for path in _in(root / UNPACKED):
        if not path.name.startswith(PARTIAL) and (stat := _stat(path)) is not None:
            name = path.name.partition("-")[0]
            yield Copy(
                kind="unpacked",
                name=path.name,
                paths=(path,),
                bytes=stat.st_size,
                written=stat.st_mtime,
                uses=uses.get(name, ()),
            )


def _stat(path: Path) -> os.stat_result | None:
    """None of what is no more: a run may be copying."""
    with suppress(FileNotFoundError):
        return path.stat()
    return None


def _in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _uses(root: Path) -> Uses:
    found: dict[str, list[Use]] = {}
    for path in _in(root / RUNS):
        told = _object(path)
        folder, used = Path(str(told.get("run", ""))), told.get("used")
        if not isinstance(used, int | float):
            continue
        try:
            places = Manifest.places(folder / MANIFEST)
        except (OSError, ManifestDamaged):
            continue
        use = Use(run=str(folder), used=float(used), working=is_held(folder))
        for name in {name for place in places for name in _names(root / DOWNLOADS, place)}:
            found.setdefault(name, []).append(use)
    return {name: tuple(uses) for name, uses in found.items()}


def _names(downloads: Path, place: str) -> Iterator[str]:
    """What the copies at or behind a place of a manifest are called."""
    if kind_of(place) == "webdataset":
        yield name_of(place)
    with suppress(ValueError):  # it lies elsewhere
        parts = Path(place).relative_to(downloads).parts
        if parts:
            yield parts[-1] if parts[0] == PICTURES else parts[0]


def _object(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}
