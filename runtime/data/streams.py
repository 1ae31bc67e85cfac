"""Reads containers where they lie: what they hold once, before the first plan, and each picture
when it is encoded. See `compiler.data.sources.streams`.

Of a tar the headers of its members and the first bytes of its pictures are read, of a Parquet shard
the columns that are asked for; small members that lie close together are read in longer pieces,
since each request takes its time. Nothing of a picture is written to this machine's disk.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import itertools
import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

from compiler.data.scan import shown
from compiler.data.sources.columns import list_parquet
from compiler.data.sources.compressed import compression
from compiler.data.sources.listing import Listing
from compiler.data.sources.remote import (
    HUB,
    Remote,
    hub_parts,
    is_url,
    note_of,
    note_path,
)
from compiler.data.sources.spots import kind_of
from compiler.data.sources.streams import (
    LISTINGS,
    Origin,
    Unlisted,
    hashes_path,
    listing_path,
    origin_of,
    stand_in,
)
from compiler.data.sources.tars import list_tar
from runtime.data import web
from runtime.data.ranged import HF, Ranged
from runtime.data.stores import below, is_picked, like, listed, store_of
from runtime.errors import RunFailed
from runtime.files import write_whole

_TOGETHER = 4  # containers listed at once
_RECORD = struct.Struct("<Q32s")  # a place, and the SHA-256 of what lies there


def name_of(url: str) -> str:
    """What a file on the web is called."""
    return os.path.basename(url.partition("?")[0].partition("#")[0])


def is_container(name: str) -> bool:
    """Whether a file is one that pictures could stand in."""
    return bool(kind_of(name)) and not any(part.startswith(".") for part in name.split("/"))


def write_stand_ins(remote: Remote, downloads: Path) -> str:
    """A stand-in for each container of a source; returns the note on them. One that stands already
    is left as it is. Raises what the libraries raise, and RunFailed where there is none."""
    target = note_path(downloads, remote).with_suffix("")
    origins, marks, whole = _origins(remote)
    if not origins:
        raise RunFailed(
            f"`{shown(remote.url)}` holds no tar or Parquet shard {like(remote)}",
            help="streaming = false copies it to this machine",
        )
    for name, origin in origins.items():
        path = below(target, name)
        if not path.is_file() or not _same(origin_of(str(path)), origin):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, stand_in(origin))
    for folder, _, names in os.walk(target):
        for name in names:
            path = Path(folder, name)
            key = path.relative_to(target).as_posix()
            if key not in origins and path.parent.name != LISTINGS:
                path.unlink()  # of what is no more
    return note_of(remote, str(target), sorted(origins), whole, marks)


def _same(known: Origin | None, now: Origin) -> bool:
    """Whether a stand-in need not change: of the hub it may speak of an older commit, in which the
    file was the same."""
    if known is not None and known.mark and known.url.startswith(HF):
        return (known.mark, known.bytes) == (now.mark, now.bytes)
    return known == now


def _origins(remote: Remote) -> tuple[dict[str, Origin], dict[str, str], str]:
    """By name: the containers of a source; the states by which a change is noticed; and what of
    the folder of stand-ins is the source."""
    if remote.url.startswith(HUB):
        return _hub_origins(remote)
    if is_url(remote.url):
        name = name_of(remote.url)
        with web.opened(remote.url, "HEAD") as answer:
            mark, size = web.state(answer), web.length(answer)
        if size is None:
            raise ValueError("the server does not say how long it is")
        return {name: Origin(url=remote.url, bytes=size, mark=mark)}, {"": mark}, name
    store, root = store_of(remote.url)
    infos, whole = listed(remote, store, root)
    origins = {
        name: Origin(url=store.unstrip_protocol(path), bytes=size, mark=mark)
        for name, (path, mark, size) in infos.items()
        if is_container(name)
    }
    return origins, {name: origin.mark for name, origin in origins.items()}, whole


def _hub_origins(remote: Remote) -> tuple[dict[str, Origin], dict[str, str], str]:
    """Of the commit that the revision stands for now, which no later one changes."""
    hub: Any = importlib.import_module("huggingface_hub")
    parts = hub_parts(remote.url)
    assert parts is not None, "the compiler has judged the name"
    name, revision = parts
    info = hub.HfApi().dataset_info(name, revision=revision or None, files_metadata=True)
    root = f"{HF}datasets/{name}@{info.sha}"
    origins = {
        file.rfilename: Origin(
            url=f"{root}/{file.rfilename}", bytes=int(file.size or 0), mark=str(file.blob_id or "")
        )
        for file in info.siblings or ()
        if is_container(file.rfilename) and is_picked(file.rfilename, remote.files)
    }
    return origins, {"": str(info.sha)}, "."


def list_containers(unlisted: Sequence[Unlisted], say: Callable[[str], None]) -> None:
    """Look into containers and note what they hold, each as soon as it is known. Raises RunFailed
    where one can't be read; of those before it all is kept."""
    with ThreadPoolExecutor(_TOGETHER) as pool:
        found = [(each, pool.submit(_list, each)) for each in unlisted]
        try:
            for number, (each, future) in enumerate(found, 1):
                fetched = future.result()
                name = os.path.basename(each.path)
                say(f"{number} of {len(found)}: {shown(name)} ({fetched:,} bytes read)")
        finally:
            for _, future in found:
                future.cancel()


def _list(each: Unlisted) -> int:
    """Returns the bytes that it took."""
    origin = origin_of(each.path)
    if origin is None:
        raise RunFailed(f"{each.path} is no stand-in any more", help="run it again")
    hashes: dict[int, bytes] = {}  # by place
    rows = itertools.count()

    def row_seen(data: bytes | None) -> None:
        row = next(rows)
        if data is not None:
            hashes[row] = hashlib.sha256(data).digest()

    def member_seen(start: int, count: int) -> None:
        if (data := file.held(start, count)) is not None:
            hashes[start] = hashlib.sha256(data).digest()

    with Ranged(origin, ahead=each.kind == "webdataset") as file:
        source = cast(IO[bytes], file)
        if each.kind == "webdataset":
            if compression(source):
                raise RunFailed(
                    f"`{shown(origin.url)}` is a compressed tar, which can't be streamed",
                    help="streaming = false copies it to this machine",
                )
            listing = list_tar(each.path, each.wanted, source, member_seen)
        else:
            listing = list_parquet(each.path, each.wanted, source, row_seen)
        if file.failure is not None:  # which readers may have taken for damage
            raise file.failure
    _note(each, origin, listing, hashes)
    return file.fetched


def _note(each: Unlisted, origin: Origin, listing: Listing, hashes: Mapping[int, bytes]) -> None:
    path = listing_path(each.path, origin, each.kind, each.wanted)
    path.parent.mkdir(exist_ok=True)
    if hashes:
        records = [_RECORD.pack(at, digest) for at, digest in sorted(hashes.items())]
        write_whole(hashes_path(each.path, origin, listing.image), b"".join(records))
    write_whole(path, listing.packed())


def known_hash(path: str, at: int, column: str) -> bytes | None:
    """The SHA-256 of the picture at place `at` of a streamed container (of a shard, in `column`),
    if it was read when it was listed; else None. Raises OSError."""
    origin = origin_of(path)
    if origin is None:
        return None
    try:
        with open(hashes_path(path, origin, column), "rb") as file:
            return _found(file, at)
    except FileNotFoundError:
        return None


def _found(file: IO[bytes], at: int) -> bytes | None:
    """The record of `at` in a file of records, which are sorted."""

    def record(number: int) -> tuple[int, bytes]:
        file.seek(number * _RECORD.size)
        place, digest = _RECORD.unpack(file.read(_RECORD.size))
        return place, digest

    count = file.seek(0, io.SEEK_END) // _RECORD.size
    number = bisect_left(range(count), at, key=lambda number: record(number)[0])
    place, digest = record(number) if number < count else (at, None)
    return digest if place == at else None
