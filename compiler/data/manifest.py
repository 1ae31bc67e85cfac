"""The list of samples: every picture that is used, where it goes, and its caption.

Rows are sorted by source, then by key, a picture before its mirror image, so that the same data
give the same manifest whatever the disk's order. As a file it is one line of JSON per source,
placement, caption and sample, behind a head that states the digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any

from attrs import astuple, fields, frozen

from compiler.data.geometry import Placement
from compiler.data.rows import Columns, GrowingRows, Sample, columns_of
from compiler.data.scan import ALONE
from compiler.data.texts import Numbers, Texts, decoded

__all__ = ["FORMAT", "Folder", "Item", "Manifest", "ManifestDamaged", "Members", "Sample"]

FORMAT = 3
_ROW = struct.Struct("<IQIIII")
_LENGTH = struct.Struct("<I")
_MASK = struct.Struct("<Q")
_DECODER = json.JSONDecoder()
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
    StopIteration,
    struct.error,
)
"""What a file raises that is none of ours."""


class ManifestDamaged(ValueError):
    """A manifest file that is cut off, changed, or of another format."""


@frozen(kw_only=True, slots=True)
class Folder:
    """The root of one source: the id that the plan gives it and its absolute path."""

    id: str
    path: str
    kind: str = "folder"  # as in the plan
    column: str = ""  # of a shard: the pictures'


@frozen(kw_only=True, slots=True)
class Item:
    """Where the bytes of a picture lie: a file of its own (`at` is ALONE), or a place in a
    container: the first byte of a tar's member, the row of a shard."""

    file: str
    at: int = ALONE
    bytes: int = 0
    kind: str = "folder"
    column: str = ""


@frozen(kw_only=True, slots=True)
class Members:
    """The samples of one bucket: of one source and one size."""

    source: int
    width: int
    height: int
    samples: array[int]  # row numbers, ascending (type "I")


class Manifest:
    """Rows of samples; `len`, index and iteration give `Sample`s. Immutable once built."""

    def __init__(
        self,
        folders: Sequence[Folder],
        samples: Iterable[Sample],
        held_out: Iterable[Sample] | None = None,
    ) -> None:
        """Sorts `samples`. Raises ValueError if a source holds one key twice, other than as a
        picture and its mirror image."""
        self.folders = tuple(folders)
        self.held_out = None if held_out is None else Manifest(folders, held_out)
        """What the model is judged by and not trained on, as a list of its own with the same
        folders; None where nothing is judged. It does not enter the digest."""
        self._columns = columns_of(_different(sorted(samples, key=_place)))

    def to_disk(self, folder: Path) -> None:
        """Move the rows out of memory, to a file without a name in `folder`; they stay where they
        are if there can be none."""
        with suppress(OSError):
            self._columns = self._columns.mapped(folder)
        if self.held_out is not None:
            self.held_out.to_disk(folder)

    def __len__(self) -> int:
        return len(self._columns)

    def __getitem__(self, row: int) -> Sample:
        return self._columns.sample(row)

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def path(self, row: int) -> str:
        """The absolute path of the file of `row`, be it a container."""
        columns = self._columns
        if number := columns.file[row]:
            return self._file(number)
        return os.path.join(self.folders[columns.source[row]].path, columns.keys[row])

    def item(self, row: int) -> Item:
        """Where the bytes of `row` lie."""
        folder, at = self.folders[self._columns.source[row]], self._columns.at[row]
        if at == ALONE:
            return Item(file=self.path(row))
        return Item(
            file=self.path(row),
            at=at,
            bytes=self._columns.bytes[row],
            kind=folder.kind,
            column=folder.column,
        )

    def placement(self, row: int) -> Placement:
        """The placement of `row`."""
        return self._columns.placements[self._columns.placement[row]]

    def source(self, row: int) -> int:
        """The source's number of `row`."""
        return self._columns.source[row]

    def positions(self) -> tuple[Numbers, Numbers]:
        """Of each row the number of its file, 0 if it is one of its own, and its place there: in
        the order of both each file is read from front to back."""
        return self._columns.file, self._columns.at

    def lengths(self) -> Numbers:
        """Of each row the bytes of its picture."""
        return self._columns.bytes

    def caption_numbers(self, row: int) -> list[int]:
        """Where the captions of `row`, at least one, stand in `captions`."""
        return self._columns.caption_numbers(row)

    def captions_of(self, row: int) -> tuple[str, ...]:
        """The captions of `row`, at least one."""
        return self._columns.captions_of(row)

    def name(self, row: int) -> str:
        """What a person calls `row`: the source's id and the key."""
        mirrored = " (mirrored)" if self.placement(row).mirrored else ""
        return f"{self.folders[self._columns.source[row]].id}/{self._columns.keys[row]}{mirrored}"

    def mask(self, row: int) -> str:
        """The key of the file with the mask of `row`; "" without one."""
        return self._columns.mask(row)

    @property
    def captions(self) -> tuple[str, ...]:
        """Each distinct caption once, in the order of first use."""
        return tuple(self._columns.captions)

    @property
    def texts(self) -> Texts:
        """As `captions`, each made when it is asked for."""
        return self._columns.captions

    @cached_property
    def _file(self) -> Callable[[int], str]:
        """The file of a number, which many rows may share."""
        return lru_cache(maxsize=64)(lambda number: self._columns.files[number])

    @cached_property
    def buckets(self) -> tuple[Members, ...]:
        """All buckets, by source, then width, then height."""
        columns = self._columns
        found: dict[tuple[int, int, int], array[int]] = {}
        for row in range(len(self)):
            placed = columns.placements[columns.placement[row]]
            place = (columns.source[row], placed.width, placed.height)
            found.setdefault(place, array("I")).append(row)
        return tuple(
            Members(source=source, width=width, height=height, samples=found[source, width, height])
            for source, width, height in sorted(found)
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over source ids, keys, file lengths, sizes, placements and captions.

        Neither absolute paths nor times enter, nor what kind of container holds a picture where:
        a copy of the data has the same digest.
        """
        columns = self._columns
        state = hashlib.sha256(json.dumps([folder.id for folder in self.folders]).encode())

        @lru_cache(maxsize=256)
        def placed(number: int) -> bytes:
            return hashlib.sha256(json.dumps(astuple(columns.placements[number])).encode()).digest()

        said, end = columns.caption, 0
        firsts = iter(columns.first_caption)
        next(firsts)
        for source, length, width, height, placement, text, after in zip(
            columns.source,
            columns.bytes,
            columns.width,
            columns.height,
            columns.placement,
            columns.keys.raws(),
            firsts,
            strict=True,
        ):
            start, end = end, after
            key = text if text.isascii() else os.fsencode(decoded(text))
            state.update(_ROW.pack(source, length, width, height, len(key), end - start))
            state.update(placed(placement) + key)
            for number in said[start:end]:
                state.update(_framed(columns.captions.raw(number)))
        for row, mask in zip(columns.masked, columns.masks, strict=True):
            state.update(_MASK.pack(row) + _framed(os.fsencode(mask)))
        return state.hexdigest()

    def save(self, path: Path) -> None:
        """Write the manifest to `path`, whole or not at all. Raises OSError."""
        beside = path.parent / f".partial-{path.name}"
        try:
            with open(beside, "w", encoding="ascii", newline="\n") as file:
                file.writelines(json.dumps(line) + "\n" for line in self._lines())
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read what `save` wrote; of many rows all but a few lie on the disk at any time. Raises
        ManifestDamaged, and OSError where there is no file."""
        with open(path, encoding="ascii") as file:
            try:
                return cls._read(map(_value, file), path.parent)
            except _DAMAGE as error:
                raise ManifestDamaged(f"{path}: not a whole manifest ({error})") from error

    @staticmethod
    def places(path: Path) -> set[str]:
        """The sources' folders, and the files outside of them, of a saved manifest; it is read, not
        checked. Raises ManifestDamaged, and OSError where there is no file."""
        found: set[str] = set()
        with open(path, encoding="ascii") as file:
            try:
                while line := file.readline():
                    head = json.loads(line)
                    found |= {json.loads(file.readline())[1] for _ in range(head["folders"])}
                    _pass(file, head["placements"] + head["captions"])
                    found |= {json.loads(file.readline()) for _ in range(head["files"])} - {""}
                    _pass(file, head.get("masks", 0) + head["samples"])
            except _DAMAGE as error:
                raise ManifestDamaged(f"{path}: not a whole manifest ({error})") from error
        return found

    def _places(self) -> str:
        """SHA-256 (hex) over what the digest leaves out: where each picture lies."""
        columns = self._columns
        state = hashlib.sha256(json.dumps([astuple(one) for one in self.folders]).encode())
        state.update(b"[")  # as a list in JSON, which may be long
        for number, file in enumerate(columns.files):
            state.update((", " if number else "").encode() + json.dumps(file).encode())
        state.update(b"]")
        state.update(columns.file)
        state.update(columns.at)
        return state.hexdigest()

    def _lines(self) -> Iterator[Any]:
        columns = self._columns
        yield {
            "format": FORMAT,
            "digest": self.digest,
            "places": self._places(),
            "folders": len(self.folders),
            "placements": len(columns.placements),
            "captions": len(columns.captions),
            "files": len(columns.files),
            "masks": len(columns.masks),
            "samples": len(self),
            "held_out": self.held_out is not None,
        }
        yield from (astuple(folder) for folder in self.folders)
        yield from (astuple(placement) for placement in columns.placements)
        yield from columns.captions
        yield from columns.files
        yield from ([row, mask] for row, mask in zip(columns.masked, columns.masks, strict=True))
        for row in range(len(self)):
            yield [
                columns.source[row],
                columns.keys[row],
                columns.bytes[row],
                columns.width[row],
                columns.height[row],
                columns.placement[row],
                columns.caption_numbers(row),
                columns.file[row],
                columns.at[row],
            ]
        if self.held_out is not None:
            yield from self.held_out._lines()

    @classmethod
    def _read(cls, lines: Iterator[Any], folder: Path) -> Manifest:
        head = next(lines)
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']}, not {FORMAT}")
        folders = [
            Folder(id=i, path=p, kind=k, column=c) for i, p, k, c in _take(lines, head["folders"])
        ]
        manifest = cls(folders, ())
        manifest._columns = _columns(lines, head, folder)
        if manifest.digest != head["digest"]:
            raise ValueError("the rows do not have the digest that the head states")
        if manifest._places() != head["places"]:
            raise ValueError("the places are not those that the head states")
        if head.get("held_out", False):
            manifest.held_out = cls._read(lines, folder)
        return manifest


def _place(sample: Sample) -> tuple[int, str, bool]:
    return sample.source, sample.key, sample.placement.mirrored


def _different(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Sorted samples, none of which may be there twice."""
    last: tuple[int, str, bool] | None = None
    for sample in samples:
        if last == _place(sample):
            raise ValueError(f"the key {sample.key!r} stands twice in one source")
        last = _place(sample)
        yield sample


def _columns(lines: Iterator[Any], head: dict[str, Any], folder: Path) -> Columns:
    """The rows of a file in `folder`, read a line at a time."""
    rows = GrowingRows(folder)
    names = [field.name for field in fields(Placement)]
    for values in _take(lines, head["placements"]):
        rows.add_placement(Placement(**dict(zip(names, values, strict=True))))
    for caption in _take(lines, head["captions"]):
        rows.add_caption(caption)
    for file in _take(lines, head["files"]):
        rows.add_file(file)
    for row, mask in _take(lines, head.get("masks", 0)):
        rows.add_mask(row, mask)
    for values in _take(lines, head["samples"]):
        rows.add(*values)
    return rows.columns()


def _value(line: str) -> Any:
    """What a line says. Raises ValueError."""
    value, end = _DECODER.raw_decode(line)
    return value if line[end:] in ("\n", "") else json.loads(line)


def _framed(data: bytes) -> bytes:
    """The length goes first, so that no two lists of texts give the same bytes."""
    return _LENGTH.pack(len(data)) + data


def _pass(file: IO[str], count: int) -> None:
    for _ in range(count):
        file.readline()


def _take(lines: Iterator[Any], count: int) -> Iterator[Any]:
    return islice(lines, count)
