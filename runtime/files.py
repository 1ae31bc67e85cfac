"""Files that appear whole or not at all: write beside, fsync, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"  # prefix of what is being written; no reader ever looks at such a name


def sync(path: Path) -> None:
    """Wait until `path`, a file or a folder, has reached the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows can't open folders; its renames are journalled
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content`; a reader sees the old file or the new one. Raises OSError."""
    with partial_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def beside(path: Path) -> Path:
    """Where `path` is written before it takes its name."""
    return path.parent / f"{PARTIAL}{path.name}"


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it becomes `path` when the block ends well."""
    partial = beside(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path`; it replaces `path` when the block ends well."""
    partial = beside(path)
    remove_folder(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            sync(file)
        sync(partial)
        remove_folder(path)
        partial.rename(path)
        sync(path.parent)
    except BaseException:
        remove_folder(partial)
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder and all in it, if it is there; a half-deleted one keeps no valid name."""
    if not path.exists():
        return
    doomed = path.parent / f"{PARTIAL}removed-{path.name}"
    if path.name.startswith(PARTIAL):
        doomed = path
    else:
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed)


def clean(folder: Path) -> list[str]:
    """Remove what an interrupted writer left in `folder`; returns the names."""
    left = sorted(p for p in folder.glob(f"{PARTIAL}*")) if folder.is_dir() else []
    for path in left:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in left]
