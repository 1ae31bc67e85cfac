"""Which pictures a folder holds, how large they are, and which files are faulty.

The folder is walked with all folders below it, in an order that depends on names alone. Hidden
files and folders (a name that begins with a dot, such as `.ipynb_checkpoints`) are left alone and
counted; `.txt` and `.json` companions are never opened; every other file is told by its content.
Links are followed, real folders first, and no folder is entered twice, so that loops end. What is
wrong with a file is data (`Fault`), not an exception.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, field, frozen

from compiler.data.headers import NEEDS_HEIF, Header, read_header
from compiler.data.index import Index
from compiler.data.quick_headers import Broken, Size
from compiler.data.stamp import Stamp

if TYPE_CHECKING:
    from compiler.data.sources.streams import Unlisted

__all__ = [
    "ALONE",
    "Fault",
    "File",
    "Index",
    "Picture",
    "Result",
    "Scan",
    "measured",
    "scan",
    "shown",
    "unreadable",
]

COMPANIONS = (".txt", ".json")
_WORKERS = 8  # threads: the disk may be slow or far away, the parsing is not
_CHUNK = 128  # files per task
_NAMED = 8  # hidden files and folders that are named

ALONE = -1
"""The place of a picture that is a file of its own."""


@frozen(kw_only=True, slots=True)
class Picture:
    """One readable picture; `key` is its path below the folder, with `/` between the parts, or
    what its container calls it."""

    key: str
    bytes: int  # of the file
    width: int  # pixels, after EXIF orientation
    height: int
    file: str = ""  # absolute path of its container or of itself; "": the key below the folder
    at: int = ALONE  # row or byte in the container


@frozen(kw_only=True, slots=True)
class Fault:
    """A file (or folder) that can't be used, and why."""

    path: str
    why: str

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.why}"


@frozen(kw_only=True)
class Scan:
    """All of a folder. `pictures` and `faults` are sorted by path."""

    pictures: tuple[Picture, ...]
    faults: tuple[Fault, ...]
    hidden: int  # files and folders whose name begins with a dot
    hidden_names: tuple[str, ...] = ()  # the first of them, as keys
    others: int  # files that are no pictures and do not claim to be; companions not counted
    lines: Mapping[str, tuple[str, ...] | Fault] | None = None
    """By key: lines of a caption that stand in the container; None: they stand beside the file."""
    absent: tuple[str, ...] = ()  # URLs that are not downloaded yet
    later: tuple[tuple[str, Fault], ...] = ()  # those that were asked for and that nobody gave
    fetched: tuple[str, ...] = ()  # URLs that are
    unlisted: tuple[Unlisted, ...] = ()  # streamed containers nobody has looked into yet


@frozen(slots=True)
class File:
    """A file that may be a picture, called `key`."""

    key: str
    path: str
    stamp: Stamp


@define
class _Walk:
    files: list[File] = field(factory=list)
    faults: list[Fault] = field(factory=list)
    hidden: int = 0
    hidden_names: list[str] = field(factory=list)
    entered: set[tuple[int, int]] = field(factory=set)
    links: list[tuple[str, str]] = field(factory=list)  # (path, key) of linked folders


def scan(
    folder: Path, index: Index | None = None, *, advance: Callable[[int], None] | None = None
) -> Scan:
    """Find and measure all pictures below `folder`. Writes nothing.

    `index` spares opening unchanged files and remembers the others (until its `save`); `advance`
    is told how many files are done. Raises OSError where `folder` itself can't be listed.
    """
    root = os.path.abspath(folder)
    os.scandir(root).close()
    walk = _walked(root)
    headers = measured(walk.files, root, index, advance or (lambda _: None))
    if index is not None:
        index.forget_missing({os.fsencode(file.path) for file in walk.files})
    return _sorted_out(walk, headers)


def shown(path: str) -> str:
    """`path` as one printable line: control characters and bytes that are no text are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def _walked(root: str) -> _Walk:
    walk = _Walk()
    _first(walk, os.stat(root))
    _list(walk, root, "")
    while walk.links:
        walk.links.sort(key=lambda link: link[1])
        path, key = walk.links.pop(0)
        _enter(walk, path, key)
    walk.files.sort(key=lambda file: file.key)
    return walk


def _list(walk: _Walk, folder: str, prefix: str) -> None:
    """Add what `folder` holds; a stack, not recursion: the depth has no limit but the path's."""
    waiting = [(folder, prefix)]
    while waiting:
        folder, prefix = waiting.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            walk.faults.append(unreadable(folder, error))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                walk.hidden += 1
                walk.hidden_names.append(prefix + entry.name)
            elif below := _place(walk, entry, prefix):
                waiting.append(below)


def _place(walk: _Walk, entry: os.DirEntry[str], prefix: str) -> tuple[str, str] | None:
    """Note a file or a link; returns a real folder to go on with, as (path, prefix)."""
    key = prefix + entry.name
    try:
        if entry.is_dir():
            if entry.is_symlink():
                walk.links.append((entry.path, key + "/"))
                return None
            return (entry.path, key + "/") if _first(walk, entry.stat()) else None
        if entry.name.lower().endswith(COMPANIONS):
            return None
        status = entry.stat()
    except OSError as error:
        walk.faults.append(unreadable(entry.path, error))
        return None
    if stat.S_ISREG(status.st_mode):
        walk.files.append(File(key, entry.path, Stamp.of(status)))
    else:
        walk.faults.append(Fault(path=entry.path, why="not a regular file"))
    return None


def _enter(walk: _Walk, path: str, key: str) -> None:
    """List a linked folder unless it was listed before."""
    if _first(walk, os.stat(path)):
        _list(walk, path, key)


def _first(walk: _Walk, status: os.stat_result) -> bool:
    """Whether the folder with this status is met for the first time."""
    identity = status.st_dev, status.st_ino
    met = identity in walk.entered
    walk.entered.add(identity)
    return not met


def unreadable(path: str, error: OSError) -> Fault:
    """The fault of a file that the system does not let be read."""
    reason = "a link that leads nowhere" if os.path.islink(path) else error.strerror or str(error)
    return Fault(path=path, why=f"can't be read: {reason}")


Result = Header | Fault
"""What one file is found to be."""


def measured(
    files: Sequence[File], root: str, index: Index | None, advance: Callable[[int], None]
) -> list[Result]:
    """One result per file, from the index (of what lies below `root`) or from the disk."""
    if index is None:
        return list(_opened(files, advance))
    index.load(root)
    known = [index.find(file.path, file.stamp) for file in files]
    missing = [file for file, header in zip(files, known, strict=True) if header is None]
    fresh = _opened(missing, advance)
    results: list[Result] = []
    for file, header in zip(files, known, strict=True):
        result: Result = next(fresh) if header is None else header
        if header is None and not isinstance(result, Fault):
            index.remember(file.path, file.stamp, result)
        results.append(result)
    return results


def _opened(files: Sequence[File], advance: Callable[[int], None]) -> Iterator[Result]:
    """Results in the order of `files`; many files are opened by several threads."""
    chunks = [files[i : i + _CHUNK] for i in range(0, len(files), _CHUNK)]
    if len(chunks) < 2:
        yield from _chunk(files)
        advance(len(files))
        return
    with ThreadPoolExecutor(_WORKERS) as pool:
        done = 0
        for results in pool.map(_chunk, chunks):
            done += len(results)
            advance(done)
            yield from results


def _chunk(files: Sequence[File]) -> list[Result]:
    return [_open(file) for file in files]


def _open(file: File) -> Result:
    try:
        found = read_header(file.path)
    except OSError as error:  # of the disk or of permissions: not remembered
        return unreadable(file.path, error)
    needs_package = isinstance(found, Broken) and found.why == NEEDS_HEIF  # nor is this
    return Fault(path=file.path, why=NEEDS_HEIF) if needs_package else found


def _sorted_out(walk: _Walk, results: Sequence[Result]) -> Scan:
    pictures, faults, others = [], list(walk.faults), 0
    for file, result in zip(walk.files, results, strict=True):
        if isinstance(result, Size):
            size = file.stamp.bytes
            pictures.append(
                Picture(key=file.key, bytes=size, width=result.width, height=result.height)
            )
        elif isinstance(result, Fault):
            faults.append(result)
        elif isinstance(result, Broken):
            faults.append(Fault(path=file.path, why=result.why))
        else:
            others += 1
    faults.sort(key=lambda fault: fault.path)
    return Scan(
        pictures=tuple(pictures),
        faults=tuple(faults),
        hidden=walk.hidden,
        hidden_names=tuple(sorted(walk.hidden_names)[:_NAMED]),
        others=others,
    )
