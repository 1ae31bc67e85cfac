"""All containers of a source as one `Scan`: names, sizes, places, captions and faults."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from attrs import define, evolve, field

from compiler.data.headers import NEEDS_HEIF
from compiler.data.index import Index
from compiler.data.quick_headers import Broken, Size
from compiler.data.scan import (
    ALONE,
    Fault,
    File,
    Picture,
    Result,
    Scan,
    measured,
    scan,
    unreadable,
)
from compiler.data.sources.columns import list_arrow, list_parquet
from compiler.data.sources.listing import Entry, Listing, Wanted
from compiler.data.sources.remote import FAILED, LATER, is_url, picture_path
from compiler.data.sources.spots import Spot, without_ending
from compiler.data.sources.streams import Unlisted, known_listing, origin_of
from compiler.data.sources.tables import list_table
from compiler.data.sources.tars import list_tar
from compiler.data.stamp import Stamp

READERS: dict[str, Callable[[str, Wanted], Listing]] = {
    "webdataset": list_tar,
    "parquet": list_parquet,
    "arrow": list_arrow,
    "table": list_table,
}
"""By the kind of a source: what lists one of its containers."""

Advance = Callable[[int], None]


@define
class _Item:
    """An entry, the container in which it stands, and its number there."""

    entry: Entry
    container: str
    number: int
    label: str  # what faults call it
    key: str = ""


@define
class _Gathered:
    items: list[_Item] = field(factory=list)
    faults: list[Fault] = field(factory=list)
    absent: list[str] = field(factory=list)
    later: list[tuple[str, Fault]] = field(factory=list)
    fetched: list[str] = field(factory=list)
    unlisted: list[Unlisted] = field(factory=list)
    hidden: int = 0
    others: int = 0
    columns: set[str] = field(factory=set)  # the pictures' columns


def gather(
    spot: Spot,
    wanted: Wanted,
    downloads: Path,
    index: Index | None = None,
    *,
    advance: Advance | None = None,
) -> tuple[Scan, str]:
    """All pictures of a source, and the column that they stand in ("" where there is none).

    `downloads` is where copies of URLs lie. Writes nothing; `index` spares reading unchanged
    containers. Raises SourceUnfit for what the recipe must say otherwise, and OSError where a
    folder of pictures can't be listed.
    """
    told = advance or (lambda _: None)
    if spot.kind == "folder":
        return scan(Path(spot.root), index, advance=told), ""
    found = _Gathered()
    for number, path in enumerate(spot.files, 1):
        _add(found, spot, path, wanted, index)
        told(number)
    _name(found, spot)
    results = _measured(found, downloads, index, told)
    return _sorted_out(found, results), min(found.columns, default="")


def _add(found: _Gathered, spot: Spot, path: str, wanted: Wanted, index: Index | None) -> None:
    """What one container holds; a container that can't be read is a fault."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            found.faults.append(Fault(path=path, why="not a regular file"))
            return
        stamp = Stamp.of(status)
        listing = _listed(spot, path, stamp, wanted, index, found)
    except OSError as error:
        found.faults.append(unreadable(path, error))
        return
    condemned = index.condemned(path, stamp) if index is not None else {}
    for number, entry in enumerate(listing.entries):
        if entry.at in condemned and not entry.why:
            entry = evolve(entry, why=condemned[entry.at])
        name = entry.name or f"row {number}"
        found.items.append(_Item(entry, path, number, f"{path} ({name})"))
    for name, why in listing.faults:
        found.faults.append(Fault(path=f"{path} ({name})" if name else path, why=why))
    found.hidden += listing.hidden
    found.others += listing.others
    found.columns |= {listing.image} - {""}


def _listed(
    spot: Spot,
    path: str,
    stamp: Stamp,
    wanted: Wanted,
    index: Index | None,
    found: _Gathered,
) -> Listing:
    if (origin := origin_of(path)) is not None:
        there = known_listing(path, origin, spot.kind, wanted)
        if there is None:
            found.unlisted.append(Unlisted(path=path, kind=spot.kind, wanted=wanted))
        return there or Listing()
    asked = wanted.spelt(spot.kind)
    if index is not None and (packed := index.listing(path, asked, stamp)) is not None:
        known = Listing.unpacked(packed)
        if known is not None:
            return known
    listing = READERS[spot.kind](path, wanted)
    whole = all(name for name, _ in listing.faults)
    needs_package = any(entry.why == NEEDS_HEIF for entry in listing.entries)
    if index is not None and whole and not needs_package:
        index.remember_listing(path, asked, stamp, listing.packed())
    return listing


def _name(found: _Gathered, spot: Spot) -> None:
    """Give each item the key by which the source knows it; see the package's first lines."""
    shards = {path: without_ending(os.path.relpath(path, spot.root)) for path in spot.files}
    times = Counter(_plain(item.entry) for item in found.items)
    taken: set[str] = set()
    kept: list[_Item] = []
    for item in found.items:
        name, shard = _plain(item.entry), shards[item.container]
        if not name:
            item.key = f"{shard}/{item.number:08}"
        else:
            item.key = name if times[name] == 1 else f"{shard}/{item.number}/{name}"
        if item.key in taken:
            why = "another picture of the source has this very name"
            found.faults.append(Fault(path=item.label, why=why))
            continue
        taken.add(item.key)
        kept.append(item)
    found.items = kept


def _plain(entry: Entry) -> str:
    """The name without what only tells where it lies."""
    name = entry.name
    if is_url(name):
        return name.split("://", 1)[1]
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _measured(
    found: _Gathered, downloads: Path, index: Index | None, advance: Advance
) -> dict[str, tuple[str, Stamp, Result]]:
    """By key: path, stamp and header of the pictures that are files of their own. Those that are
    not there become faults, or are absent."""
    files: list[File] = []
    for item in found.items:
        if not item.entry.file or item.entry.why:
            continue
        path = _path(found, item, downloads)
        if path is not None and (file := _file(found, item, path)) is not None:
            files.append(file)
    if not files:
        return {}
    root = os.path.commonpath([os.path.dirname(file.path) for file in files])
    headers = measured(files, root, index, advance)
    return {f.key: (f.path, f.stamp, h) for f, h in zip(files, headers, strict=True)}


def _path(found: _Gathered, item: _Item, downloads: Path) -> str | None:
    """Where an item's own file lies; None where it is not there, which is noted."""
    text = item.entry.file
    if not is_url(text):
        return os.path.normpath(os.path.join(os.path.dirname(item.container), text))
    copy = picture_path(downloads, text)
    if copy.is_file():
        found.fetched.append(text)
        return str(copy)
    if (why := _note(copy, FAILED)) is not None:
        found.faults.append(Fault(path=item.label, why=f"can't be downloaded: {why}"))
    elif (why := _note(copy, LATER)) is not None:
        found.later.append((text, Fault(path=item.label, why=f"not reachable now: {why}")))
    else:
        found.absent.append(text)
    return None


def _note(copy: Path, ending: str) -> str | None:
    """Why there is no copy, where that was noted."""
    try:
        return copy.with_name(copy.name + ending).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _file(found: _Gathered, item: _Item, path: str) -> File | None:
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            return File(item.key, path, Stamp.of(status))
        found.faults.append(Fault(path=item.label, why="not a regular file"))
    except OSError as error:
        found.faults.append(Fault(path=item.label, why=unreadable(path, error).why))
    except ValueError:
        found.faults.append(Fault(path=item.label, why="this is no path"))
    return None


def _sorted_out(found: _Gathered, files: dict[str, tuple[str, Stamp, Result]]) -> Scan:
    pictures: list[Picture] = []
    lines: dict[str, tuple[str, ...] | Fault] = {}
    for item in found.items:
        made = _picture(item, files)
        if isinstance(made, Fault):
            found.faults.append(made)
        elif made is not None:
            pictures.append(made)
            no_lines, said = item.entry.no_lines, item.entry.lines
            lines[item.key] = Fault(path=item.label, why=no_lines) if no_lines else said
    return Scan(
        pictures=tuple(sorted(pictures, key=lambda picture: picture.key)),
        faults=tuple(sorted(found.faults, key=lambda fault: fault.path)),
        hidden=found.hidden,
        others=found.others,
        lines=lines,
        absent=tuple(found.absent),
        later=tuple(found.later),
        fetched=tuple(found.fetched),
        unlisted=tuple(found.unlisted),
    )


def _picture(item: _Item, files: dict[str, tuple[str, Stamp, Result]]) -> Picture | Fault | None:
    entry = item.entry
    if entry.why:
        return Fault(path=item.label, why=entry.why)
    if entry.at != ALONE:
        return Picture(
            key=item.key,
            bytes=entry.bytes,
            width=entry.width,
            height=entry.height,
            file=item.container,
            at=entry.at,
        )
    if item.key not in files:
        return None  # noted before
    path, stamp, header = files[item.key]
    match header:
        case Size(width=width, height=height):
            return Picture(key=item.key, bytes=stamp.bytes, width=width, height=height, file=path)
        case Broken(why=why):
            return Fault(path=item.label, why=why)
        case Fault():
            return header
    return Fault(path=item.label, why="not an image: the content is of no format that is read")
