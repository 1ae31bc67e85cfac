"""Folders and files of the stores that fsspec knows: S3, Google, Azure and others."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from compiler.data.scan import shown
from compiler.data.sources.remote import Remote
from runtime.errors import MachineUnfit, RunFailed

_STATES = ("ETag", "etag", "md5Hash", "md5", "mtime", "LastModified", "last_modified", "updated")
"""What stores call the state of a file, the surest first; fsspec has no one name for it."""


def store_of(url: str) -> tuple[Any, str]:
    """The store and the path there. Raises MachineUnfit without the package for it."""
    try:
        core: Any = importlib.import_module("fsspec.core")
        store, root = core.url_to_fs(url)
    except ImportError as error:  # fsspec itself, or what it needs for this store
        raise MachineUnfit(
            f"`{shown(url)}` needs a package that is not installed: {error}",
            help='pip install "tuner[stores]"',
        ) from error
    return store, str(root).rstrip("/")


def listed(remote: Remote, store: Any, root: str) -> tuple[dict[str, tuple[str, str, int]], str]:
    """By name: the path, the state and the length of each file of a source, as the store says it
    now; and what of it is the source."""
    store.invalidate_cache()
    if store.isfile(root):
        name, info = os.path.basename(root), store.info(root)
        return {name: (root, state(info), _length(info))}, name
    found = {p[len(root) :].lstrip("/"): (p, i) for p, i in store.find(root, detail=True).items()}
    picked = {
        name: (path, state(info), _length(info))
        for name, (path, info) in found.items()
        if is_picked(name, remote.files)
    }
    return picked, "."


def state(info: Mapping[str, Any]) -> str:
    """What a store says of a file's state; "" where it says nothing."""
    said = [str(info[key]) for key in (*_STATES, "created") if info.get(key) is not None]
    return f"{said[0]} {info.get('size', '')}" if said else ""


def _length(info: Mapping[str, Any]) -> int:
    return int(info.get("size") or 0)


def is_picked(name: str, patterns: Sequence[str]) -> bool:
    """Whether the recipe's patterns, all files if there are none, pick a name."""
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def like(remote: Remote) -> str:
    """What a source without such files lacks."""
    return "at all" if not remote.files else f"like {', '.join(remote.files)}"


def below(folder: Path, name: str) -> Path:
    """A name of the store as a path below `folder`; some stores let a name hold `..`."""
    path = Path(os.path.normpath(folder / name))
    if path == folder or not path.is_relative_to(folder) or "\0" in name:
        raise RunFailed(f"a file of the store has a name that leads elsewhere: {shown(name)}")
    return path
