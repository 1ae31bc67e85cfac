"""Containers that are read where they lie, each by a stand-in on this machine.

A stand-in is a small file in the user's cache folder that has the container's name and says where
it lies, how long it is, and in which state it was. What it holds is listed once, before the first
plan, and lies beside it, so that a plan opens no connection; pictures are fetched when they are
encoded, and not kept. Since a stand-in has a path and times like any file, all that goes by those
(keys, hashes, faults) is as of a copy.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

from attrs import astuple, frozen

from compiler.data.sources.listing import Listing, SourceUnfit, Wanted
from compiler.data.sources.spots import kind_of
from compiler.data.stamp import Stamp

KINDS = ("webdataset", "parquet")
"""What can be read in parts."""
LISTINGS = ".listings"
"""The folder beside stand-ins; hidden, so that no source holds it."""
_HEAD = b'{"streamed": '
_LONGEST = 1 << 16  # bytes of a stand-in


@frozen(kw_only=True)
class Origin:
    """The container that a stand-in stands for."""

    url: str  # hf://, http(s)://, or of a store
    bytes: int
    mark: str  # its state when it was found; "": not known


@frozen(kw_only=True)
class Unlisted:
    """A container of which nobody has listed what it holds."""

    path: str  # of the stand-in
    kind: str
    wanted: Wanted


def stand_in(origin: Origin) -> bytes:
    """The content of a stand-in."""
    return json.dumps({"streamed": origin.url, "bytes": origin.bytes, "mark": origin.mark}).encode(
        "ascii"
    )


def origin_of(path: str) -> Origin | None:
    """What the file at `path` stands for; None where it is a file like any other. Raises
    OSError."""
    return _origin(path, Stamp.of(os.stat(path)))


@lru_cache(maxsize=4096)
def _origin(path: str, stamp: Stamp) -> Origin | None:
    if stamp.bytes > _LONGEST:
        return None
    with open(path, "rb") as file:
        content = file.read(len(_HEAD))
        if content != _HEAD:
            return None
        content += file.read(_LONGEST)
    try:
        told = json.loads(content)
        return Origin(url=str(told["streamed"]), bytes=int(told["bytes"]), mark=str(told["mark"]))
    except (ValueError, KeyError, TypeError):
        return None


def listing_path(path: str, origin: Origin, kind: str, wanted: Wanted) -> Path:
    """Where it is kept what the container holds, under what is asked of it."""
    return _beside(path, origin, wanted.spelt(kind))


def hashes_path(path: str, origin: Origin, column: str) -> Path:
    """Where the SHA-256 of those pictures is kept that were read when they were listed; of a shard
    those of one `column`, else ""."""
    return _beside(path, origin, f"hashes {column}")


def _beside(path: str, origin: Origin, what: str) -> Path:
    folder, name = os.path.split(path)
    told = json.dumps([name, *astuple(origin), what]).encode("ascii")
    return Path(folder) / LISTINGS / hashlib.sha256(told).hexdigest()[:32]


def known_listing(path: str, origin: Origin, kind: str, wanted: Wanted) -> Listing | None:
    """What the container holds; None where nobody has looked yet.

    Raises SourceUnfit where it can't be streamed.
    """
    judge(path, kind)
    try:
        packed = listing_path(path, origin, kind, wanted).read_bytes()
    except FileNotFoundError:
        return None
    listing = Listing.unpacked(packed)
    if listing is not None and any(entry.file for entry in listing.entries):
        raise _unfit(os.path.basename(path), "its rows are paths or URLs of images, not images")
    return listing


def judge(path: str, kind: str = "") -> None:
    """Raise SourceUnfit if a container can't be read in parts; "" is a kind that is not known yet,
    and then the name tells what it tells."""
    name = os.path.basename(path.partition("?")[0].partition("#")[0])
    kind = kind or kind_of(name)
    if kind == "webdataset" and kind_of(name) and not name.lower().endswith(".tar"):
        raise _unfit(name, "a compressed tar can only be read from its beginning")
    if kind not in (*KINDS, ""):
        what = "its images are files" if kind == "folder" else f"its format is {kind}"
        raise _unfit(name, f"{what}, and only tars and Parquet shards are read in parts")


def _unfit(name: str, why: str) -> SourceUnfit:
    return SourceUnfit(
        "not-streamed",
        f"`{name}` can't be streamed: {why}",
        help="streaming = false copies it to this machine",
        key="streaming",
    )
