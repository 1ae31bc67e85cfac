"""What lies elsewhere, and where its copy lies here.

    hub:owner/name[@revision]       a data set of the Hugging Face hub
    s3://... gs://... az://... ...  a folder or file in a store that fsspec knows
    https://.../x.parquet           one container on the web
    https://.../a.jpg               one picture, as a row of a table says it

A plan opens no connection. `tuner run` copies what a recipe names into the user's cache folder,
once, and notes there what it copied, and in which state; every plan after that reads the copy. A
run asks whether the origins are still in that state, and copies what has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from compiler.files import read_small

DOWNLOADS = "downloads"
"""The folder of copies in the user's cache folder."""
PICTURES = "urls"
"""The folder in it of single pictures."""
NOTE = ".json"
FAILED = ".failed"
"""Ends the name of a note that a picture can't be had."""
LATER = ".later"
"""Ends the name of a note that it could not be had at first; its time is that of the first try."""
HUB = "hub:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WEB = re.compile(r"https?://", re.IGNORECASE)


@frozen(kw_only=True)
class Remote:
    """A source that lies elsewhere; `files` are the recipe's patterns, all if there are none.

    Of one that is `streamed`, stand-ins are made instead of copies; see `streams`.
    """

    url: str
    files: tuple[str, ...]
    streamed: bool = False


def is_remote(path: str) -> bool:
    """Whether a source's path is no path of this machine."""
    return path.startswith(HUB) or _SCHEME.match(path) is not None


def is_url(text: str) -> bool:
    """Whether a table's row names a picture on the web."""
    return _WEB.match(text) is not None


def hub_parts(url: str) -> tuple[str, str] | None:
    """(owner/name, revision or "") of `hub:owner/name@revision`; None if it is not of that form."""
    name, _, revision = url.removeprefix(HUB).partition("@")
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) and ".." not in name
    return (name, revision) if plain else None


def note_path(downloads: Path, remote: Remote) -> Path:
    """Where it is noted what was copied."""
    streamed = ["", "streamed"] if remote.streamed else []  # no URL is empty
    return downloads / (_digest([remote.url, *remote.files, *streamed]) + NOTE)


def copied(downloads: Path, remote: Remote) -> str | None:
    """The path of a remote source's copy, or of its stand-ins; None where it is not there, or not
    whole."""
    try:
        note: Any = json.loads(read_small(note_path(downloads, remote)))
        root = str(note["root"])
        whole = all(os.path.isfile(os.path.join(root, name)) for name in note["files"])
        return os.path.join(root, str(note["open"])) if note["files"] and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_of(
    remote: Remote, root: str, files: Sequence[str], open: str, marks: Mapping[str, str]
) -> str:
    """What `copied` reads: the folder of copies, those in it, and what of it is the source. `marks`
    tell the states of the originals."""
    found = {"url": remote.url, "root": root, "files": list(files), "open": open}
    return json.dumps(found | {"marks": dict(marks)})


def marks_of(downloads: Path, remote: Remote) -> dict[str, str]:
    """By name: the state that an original had when it was copied; of some it is not known."""
    try:
        marks: Any = json.loads(read_small(note_path(downloads, remote)))["marks"]
        return {str(name): str(mark) for name, mark in marks.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def picture_path(downloads: Path, url: str) -> Path:
    """Where the copy of one picture lies. Beside it, with FAILED behind, lies why there is none."""
    digest = _digest([url])
    return downloads / PICTURES / digest[:2] / digest


def _digest(parts: Sequence[str]) -> str:
    text = json.dumps(list(parts)).encode("ascii")
    return hashlib.sha256(text).hexdigest()
