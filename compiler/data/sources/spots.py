"""What a source's path leads to: a folder of pictures, or a list of containers of one kind.

By its ending a file is a tar, a shard or a table; a path with `*`, `?` or `[` stands for all files
that fit; a folder is one of pictures, unless it holds shards or what `datasets` has saved. `files`
picks some of a folder's files by their names below it. Where names speak of splits (train, test,
validation) and nothing is picked, that is asked back: test data must not be trained on by chance.
Of pictures, folders that are called so say it.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, cast

from attrs import frozen

from compiler.data.headers import claims_picture
from compiler.data.sources.listing import PATH, SourceUnfit
from compiler.data.sources.remote import HUB

Kind = Literal["folder", "webdataset", "parquet", "arrow", "table"]
ENDINGS: dict[str, Kind] = {
    ".tar": "webdataset",
    ".tar.gz": "webdataset",
    ".tgz": "webdataset",
    ".tar.bz2": "webdataset",
    ".tar.xz": "webdataset",
    ".tar.zst": "webdataset",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".jsonl": "table",
    ".ndjson": "table",
    ".csv": "table",
    ".tsv": "table",
}
_SHARDS = ("webdataset", "parquet", "arrow")  # a table beside pictures may be about anything
_SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation"}
_SPLITS |= {"val": "validation", "dev": "validation"}
_WORDS = re.compile(r"[a-z]+")


@frozen(kw_only=True)
class Spot:
    """Where a source lies. `files` are its containers, sorted; a folder of pictures has none."""

    path: str  # absolute, as the recipe says it: a folder, a file, or a pattern
    root: str  # labels of containers are relative to this folder
    kind: Kind
    files: tuple[str, ...] = ()


def name_of(path: str) -> str:
    """What a source at `path` is called if it has no name: its folder, file or data set."""
    name = Path(path.partition("@")[0] if path.startswith(HUB) else path)
    if glob.has_magic(path):
        name = name.parent
    return without_ending(name.name)


def spot_of(path: Path, asked: str, files: Sequence[str]) -> Spot | None:
    """What lies at `path`, which is absolute; None where there is nothing to be found.

    `asked` is the recipe's format, "auto" to look. Raises SourceUnfit, OSError and ValueError.
    """
    text = os.path.normpath(path)
    if path.is_dir():
        return _folder(text, asked, files)
    if files:
        raise SourceUnfit(
            "no-effect", "`files` has no effect: it picks files of a folder", key="files"
        )
    if path.exists():
        return Spot(path=text, root=os.path.dirname(text), kind=_kind([text], asked), files=(text,))
    if not glob.has_magic(text):
        return None
    found = sorted(name for name in glob.glob(text, recursive=True) if os.path.isfile(name))
    if not found:
        return None
    return Spot(
        path=text,
        root=os.path.commonpath(map(os.path.dirname, found)),
        kind=_kind(found, asked),
        files=tuple(found),
    )


def _folder(root: str, asked: str, picked: Sequence[str]) -> Spot:
    if asked == "folder":
        if picked:
            raise SourceUnfit(
                "no-effect", "`files` has no effect: it picks tars, shards or tables", key="files"
            )
        return Spot(path=root, root=root, kind="folder")
    saved = _saved(root)
    if asked == "auto" and not saved and not picked and _top_pictures(root):
        return _pictures(root)
    below = saved or _below(root)
    if picked:
        below = _picked(below, picked)
        return Spot(path=root, root=root, kind=_kind(below, asked), files=_joined(root, below))
    kinds = {ENDINGS[ending] for name in below if (ending := _ending(name)) in ENDINGS}
    wanted = {cast(Kind, asked)} if asked != "auto" else kinds & set(_SHARDS)
    if not wanted:
        return _pictures(root)
    if len(wanted) > 1:
        raise SourceUnfit(
            "unreadable-source",
            f"the folder holds files of several formats: {', '.join(sorted(wanted))}",
            help=f'format = "{min(wanted)}"',
        )
    kind = wanted.pop()
    chosen = [name for name in below if ENDINGS.get(_ending(name)) == kind]
    if not chosen:
        raise SourceUnfit("no-images", f"the folder holds no file of the format {kind}")
    _one_split(chosen)
    return Spot(path=root, root=root, kind=kind, files=_joined(root, chosen))


def _pictures(root: str) -> Spot:
    """A folder of pictures that may be of one split only."""
    folders = {
        entry.name: split
        for entry in os.scandir(root)
        if (split := _SPLITS.get(entry.name.lower())) and entry.is_dir()
    }
    found = {name: split for name, split in sorted(folders.items()) if _holds(root, name)}
    if len(set(found.values())) > 1:
        first = min(found, key=lambda name: _train_first(found[name]))
        told = next((n for n in metadata_tables(root) if n.startswith(first + os.sep)), "")
        one = f'path = "{PATH}/{first}" for one of them'
        if told:
            one = f'files = ["{told}"] for images and captions of one of them'
        raise SourceUnfit(
            "several-splits",
            f"the folder holds several splits of a data set: {', '.join(found)}",
            help=f'{one}, or format = "folder" for the images of all',
        )
    return Spot(path=root, root=root, kind="folder")


def _holds(root: str, name: str) -> bool:
    """Whether pictures lie in a folder, however deep."""
    below = os.walk(os.path.join(root, name))
    return any(claims_picture(each) for _, _, names in below for each in names)


def metadata_tables(root: str) -> list[str]:
    """Tables below a folder that are called as `datasets` calls those of captions (ImageFolder)."""
    tables = (name for name in _below(root) if kind_of(name) == "table")
    return [name for name in tables if os.path.basename(name).lower().startswith("metadata.")]


def _top_pictures(root: str) -> bool:
    """Whether pictures lie in the folder itself: then shards beside them are something else."""
    with os.scandir(root) as entries:
        return any(claims_picture(e.name) and not e.name.startswith(".") for e in entries)


def _below(root: str) -> list[str]:
    """Names of all files below a folder that could be containers, sorted; hidden ones not."""
    found: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in names
            if not name.startswith(".") and _ending(name) in ENDINGS
        ]
    return sorted(found)


def _saved(root: str) -> list[str]:
    """The shards of a data set that `datasets` has saved here; none if it has not."""
    splits = _json(os.path.join(root, "dataset_dict.json"), "splits")
    folders = [name for name in splits if isinstance(name, str)] or [""]
    found: list[str] = []
    for folder in folders:
        rows = _json(os.path.join(root, folder, "state.json"), "_data_files")
        names = [str(row.get("filename")) for row in rows if isinstance(row, dict)]
        found += [os.path.join(folder, name) for name in names if _is_plain(name)]
    return sorted(found)


def _is_plain(name: str) -> bool:
    return os.path.basename(name) == name != ""


def _json(path: str, key: str) -> list[object]:
    from compiler.files import read_small

    try:
        value = json.loads(read_small(Path(path)))
    except (OSError, ValueError, RecursionError):
        return []
    rows = value.get(key) if isinstance(value, dict) else None
    return rows if isinstance(rows, list) else []


def _picked(below: Sequence[str], patterns: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        fitting = [name for name in below if fnmatchcase(name, pattern)]
        if not fitting:
            raise SourceUnfit(
                "missing-path",
                f"no tar, shard or table in the folder is called `{pattern}`",
                help="it holds " + (", ".join(below[:8]) or "none at all"),
                key="files",
            )
        found += fitting
    return sorted(set(found))


def _joined(root: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(os.path.join(root, name) for name in names)


def _kind(files: Sequence[str], asked: str) -> Kind:
    if asked == "folder":
        raise SourceUnfit(
            "unreadable-source",
            'it is a file, and `format = "folder"` asks for a folder',
            key="format",
        )
    if asked != "auto":
        return cast(Kind, asked)
    kinds = {ENDINGS.get(_ending(name)) for name in files}
    if len(kinds) > 1 or None in kinds:
        raise SourceUnfit(
            "missing-path" if kinds == {None} else "unreadable-source",
            "is a file, not a folder" if kinds == {None} else "the files have several formats",
            help="files that are read: " + ", ".join(ENDINGS) + '; else say format = "..."',
        )
    return cast(Kind, kinds.pop())


def _one_split(names: Sequence[str]) -> None:
    splits = {split for name in names if (split := split_of(name))}
    if len(splits) > 1:
        first = next(name for name in names if split_of(name) == min(splits, key=_train_first))
        raise SourceUnfit(
            "several-splits",
            f"the folder holds several splits of a data set: {', '.join(sorted(splits))}",
            help=f'files = ["{_pattern(first)}"] for one of them, or files = ["*"] for all',
        )


def _train_first(split: str) -> tuple[bool, str]:
    return split != "train", split


def split_of(name: str) -> str:
    """The split that a shard's name speaks of; "" if it speaks of none."""
    words = _WORDS.findall(name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def _pattern(name: str) -> str:
    folder, base = os.path.split(name)
    if split_of(folder):
        return os.path.join(folder, "*")
    word = next(w for w in _WORDS.findall(base.lower()) if w in _SPLITS)
    return os.path.join(folder, base[: base.lower().index(word) + len(word)] + "*")


def kind_of(name: str) -> str:
    """What a file is by its name's ending; "" where that tells nothing."""
    return ENDINGS.get(_ending(name), "")


def _ending(name: str) -> str:
    stem, last = os.path.splitext(name.lower())
    both = os.path.splitext(stem)[1] + last
    return both if both in ENDINGS else last


def without_ending(name: str) -> str:
    """The name of a container, or its path, without what tells its kind."""
    ending = _ending(name)
    return name[: -len(ending)] if ending in ENDINGS else name
