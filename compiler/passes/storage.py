"""Where things are written, and whether they can be."""

from __future__ import annotations

import os
import re
from pathlib import Path

from compiler.draft import Draft
from compiler.source import dotted
from compiler.spans import KeyPath

SAFE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
DEVICE_NAME = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.I)
"""What Windows takes for a device, whatever ending it has."""
LONGEST_NAME = 80  # characters; systems take 255, and more is put behind it


def resolve_storage(draft: Draft) -> None:
    """Fill in `draft.run_folder` and `draft.cache_folder`; touches nothing."""
    name = draft.recipe.name
    if not safe_name(name, LONGEST_NAME):
        draft.error(
            "bad-name",
            ("name",),
            f"`{name}` can't name a folder everywhere",
            help=how_to_name(name, LONGEST_NAME),
        )
        return
    output = _resolved(draft, ("output",), draft.recipe.output)
    if output is None:
        return
    draft.run_folder = str(output / name)
    draft.decide(("output",), draft.run_folder)
    _check_writable(draft, ("output",), Path(draft.run_folder))
    cache = draft.cache_default
    if draft.recipe.cache.path:
        own = _resolved(draft, ("cache", "path"), draft.recipe.cache.path)
        if own is None:
            return
        cache = own
        _check_writable(draft, ("cache", "path"), cache)
    draft.cache_folder = str(cache)
    draft.decide(("cache", "path"), draft.cache_folder, why="shared by all runs of this user")
    _apart_from_data(draft)


def safe_name(name: str, longest: int) -> bool:
    """Whether a file or folder may be called `name` on every system."""
    fits = len(name) <= longest and SAFE_NAME.fullmatch(name) is not None
    return fits and not DEVICE_NAME.fullmatch(name)


def how_to_name(name: str, longest: int) -> str:
    """What to do about a name that is not safe."""
    if DEVICE_NAME.fullmatch(name):
        return f"Windows takes it for a device: say more, such as `{name.partition('.')[0]}-1`"
    first = "begin with a letter or digit and don't end with `.`"
    return f"use letters, digits, `.`, `_` and `-`, at most {longest}; {first}"


def _resolved(draft: Draft, path: KeyPath, text: str) -> Path | None:
    try:
        return (draft.folder / Path(text).expanduser()).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        draft.error("bad-path", path, f"this is no path: {error}")
        return None


def _apart_from_data(draft: Draft) -> None:
    """What is written and what is read must not lie in each other.

    Pictures and checkpoints would become training data, and who clears a run or a cache would
    delete data with it.
    """
    written = (
        (("output",), "the run folder", Path(draft.run_folder)),
        (("cache", "path"), "the cache", Path(draft.cache_folder)),
    )
    for number, source in enumerate(draft.recipe.data.source):
        where: KeyPath = ("data", "source", number, "path")
        if not source.path.strip():
            continue  # the data pass says so
        try:
            data = (draft.folder / Path(source.path).expanduser()).resolve()
        except (OSError, ValueError, RuntimeError):
            continue  # the data pass says so
        for key, what, folder in written:
            if folder.is_relative_to(data):
                draft.entangled.add(number)
                draft.error(
                    "data-not-apart",
                    key if draft.given(key) else where,
                    f"{what} `{folder}` would lie in the data folder `{source.path}`",
                    help=f"nothing is written beside your data: choose another `{dotted(key)}`",
                )
                break
            elif data.is_relative_to(folder):
                draft.entangled.add(number)
                draft.error(
                    "data-not-apart",
                    where,
                    f"the data folder `{source.path}` lies in {what} `{folder}`",
                    help="runs and caches are cleared as a whole: keep data elsewhere",
                )
                break


def _check_writable(draft: Draft, path: KeyPath, folder: Path) -> None:
    """Whether `folder` could be made and written; looks at the nearest parent that exists."""
    place = path if draft.given(path) else ("name",)
    try:
        parent = folder
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        if not parent.is_dir():
            draft.error("unwritable-output", place, f"`{parent}` is a file, not a folder")
        elif not os.access(parent, os.W_OK | os.X_OK) or _read_only(parent):
            draft.error(
                "unwritable-output",
                place,
                f"`{parent}` can't be written to",
                help="choose another folder, or change its permissions",
            )
    except OSError as error:
        draft.error(
            "unwritable-output", place, f"`{folder}` can't be used: {error.strerror or error}"
        )


def _read_only(folder: Path) -> bool:
    """A file system that takes no writes, or a folder whose permissions forbid them to all.

    `os.access` says yes to the administrator whatever the permission bits say; a folder that
    nobody may write to is meant to stay as it is.
    """
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return True
    return folder.stat().st_mode & 0o222 == 0
