"""WebDataset tars: pictures and their captions grouped by name, read in place.

A member `dog/00.jpg` takes its caption from the member `dog/00.txt` or `dog/00.json`, as in a
folder. Where there is none of its name, it takes the one of its sample, if that is no other
picture's: a sample is what has one name up to the first dot (the WebDataset format), so that
`dog/00.image.jpg` and `dog/00.caption.txt` belong together.

Members are told by content as files are. Only plain members count: links, devices and sparse
members are faults if they claim to be pictures, and so is a picture with an absolute name or one
with `..` in it. A compressed tar is listed in one pass from start to end; places are those in what
it expands to, which a run unpacks once.
"""

from __future__ import annotations

import io
import os
import posixpath
import shutil
import tarfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from tempfile import SpooledTemporaryFile
from typing import IO, Any, cast

from attrs import define, evolve, field

from compiler.data.captions import COMPANION, MAX_BYTES, lines_of_json, lines_of_text
from compiler.data.headers import Foreign, claims_picture, header_of
from compiler.data.quick_headers import Size
from compiler.data.scan import COMPANIONS, Fault
from compiler.data.sources.compressed import DAMAGED, Forward, compression, expanded
from compiler.data.sources.listing import Entry, Listing, Wanted
from compiler.files import at_once

_HELD = 16 << 20  # bytes of a member of a compressed tar that are held in memory
_LARGEST = 1 << 30  # bytes of a picture in one

Body = Callable[[tarfile.TarInfo], IO[bytes]]
"""The content of a member, as a file."""
Seen = Callable[[int, int], None]


@define
class _Found:
    entries: list[Entry] = field(factory=list)
    faults: list[tuple[str, str]] = field(factory=list)
    texts: dict[str, tuple[str, ...] | str] = field(factory=dict)  # stem -> lines, or why not
    hidden: int = 0
    others: int = 0


def list_tar(
    path: str, wanted: Wanted, file: IO[bytes] | None = None, seen: Seen | None = None
) -> Listing:
    """All pictures of the tar at `path`, or in an open `file`, with their captions' lines; `seen`
    is told where each picture begins and how long it is, once its header was read.

    Raises OSError where it can't be opened, and SourceUnfit where it is compressed in a way that
    can't be read here.
    """
    found = _Found()
    with nullcontext(file) if file else open(path, "rb", opener=at_once) as raw:
        plain, body = _opened(raw)
        try:
            with tarfile.open(fileobj=plain, mode="r:", encoding="utf-8") as tar:
                kept: Any = tar
                while (member := tar.next()) is not None:
                    kept.members.clear()  # or it would hold all of them
                    count = len(found.entries)
                    _add(found, member, body, wanted)
                    if seen is not None and len(found.entries) > count:
                        seen(member.offset_data, member.size)
                _judge_end(found, plain, kept.offset)
        except (tarfile.TarError, OverflowError, *DAMAGED) as error:
            found.faults.append(("", f"not a whole tar: {error}"))
    samples = _samples(found)
    return Listing(
        entries=tuple(_captioned(entry, found, samples) for entry in found.entries),
        faults=tuple(found.faults),
        hidden=found.hidden,
        others=found.others,
    )


def _opened(raw: IO[bytes]) -> tuple[IO[bytes], Body]:
    """The tar in a file, be it compressed, and what opens its members."""
    kind = compression(raw)
    if not kind:
        return raw, lambda member: _window(raw, member)
    stream = cast(IO[bytes], Forward(expanded(raw, kind)))

    def body(member: tarfile.TarInfo) -> IO[bytes]:
        held = SpooledTemporaryFile(_HELD)  # noqa: SIM115 (closed with its last name)
        shutil.copyfileobj(_window(stream, member), held, 1 << 20)
        held.seek(0)
        return cast(IO[bytes], held)

    return stream, body


def _window(file: IO[bytes], member: tarfile.TarInfo) -> IO[bytes]:
    return cast(IO[bytes], Window(file, member.offset_data, member.size))


def _judge_end(found: _Found, file: IO[bytes], offset: int) -> None:
    """A tar ends with blocks of zeros; Python's reader takes damage in the middle for the end."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        found.faults.append(("", "not a whole tar: it is damaged, or its end is missing"))


def _add(found: _Found, member: tarfile.TarInfo, body: Body, wanted: Wanted) -> None:
    name = _plain(member.name)
    if member.isdir():
        return
    if posixpath.basename(name).startswith("."):
        found.hidden += 1
        return
    wrong = _wrong(name, member)
    stem, ending = posixpath.splitext(name)
    if ending.lower() in COMPANIONS:
        if not wrong and ending.lower() == COMPANION.get(wanted.captions.kind):
            found.texts[stem] = _lines(body, member, wanted)
        return
    if wrong:
        if claims_picture(name):
            found.faults.append((name, wrong))
        else:
            found.others += 1
        return
    header = header_of(name, body(member), member.size)
    if isinstance(header, Foreign):
        found.others += 1
    elif isinstance(header, Size):
        found.entries.append(
            Entry(
                name=name,
                at=member.offset_data,
                bytes=member.size,
                width=header.width,
                height=header.height,
            )
        )
    else:
        found.entries.append(
            Entry(name=name, at=member.offset_data, bytes=member.size, why=header.why)
        )


def _plain(name: str) -> str:
    """Without the `./` that tar puts before names."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _wrong(name: str, member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return "a link in a tar is not followed"
    if not member.isreg() or member.issparse():
        return "not a plain member of the tar"
    if name.startswith("/") or ".." in name.split("/"):
        return "a name that leads out of the tar"
    if member.size > _LARGEST:
        return f"longer than {_LARGEST >> 20:,} MiB: this is no picture"
    return ""


def _lines(body: Body, member: tarfile.TarInfo, wanted: Wanted) -> tuple[str, ...] | str:
    if member.size > MAX_BYTES:
        return f"longer than {MAX_BYTES:,} bytes: this is no caption"
    data = body(member).read(member.size) or b""
    if wanted.captions.kind == "json":
        lines = lines_of_json(data, wanted.captions.key, member.name)
    else:
        lines = lines_of_text(data, member.name)
    return lines.why if isinstance(lines, Fault) else tuple(lines)


def _samples(found: _Found) -> dict[str, str]:
    """By sample: the stem of its one caption that is called like no picture."""
    pictures = {posixpath.splitext(entry.name)[0] for entry in found.entries}
    loose: dict[str, list[str]] = {}
    for stem in found.texts.keys() - pictures:
        loose.setdefault(_sample(stem), []).append(stem)
    return {sample: stems[0] for sample, stems in loose.items() if len(stems) == 1}


def _sample(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _captioned(entry: Entry, found: _Found, samples: Mapping[str, str]) -> Entry:
    stem = posixpath.splitext(entry.name)[0]
    said = found.texts.get(stem if stem in found.texts else samples.get(_sample(stem), stem))
    if said is None:
        return entry
    return evolve(entry, no_lines=said) if isinstance(said, str) else evolve(entry, lines=said)


class Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As files do; before the start is the start."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """Bytes from the window's start."""
        return self._at

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        """As files do; nothing behind the window's end."""
        count = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
