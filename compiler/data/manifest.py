"""The list of samples: every picture that is used, where it goes, and its caption.

A manifest is held in columns, because there may be millions of rows: numbers in arrays, placements
and captions once each however many pictures share them. Rows are sorted by source, then by key, a
picture before its mirror image, so that the same data give the same manifest whatever the disk's
order. As a file it is one line of JSON per source, placement, caption and sample, behind a head
that states the digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from attrs import astuple, fields, frozen

from compiler.data.geometry import Placement
from compiler.data.scan import ALONE

FORMAT = 3
_ROW = struct.Struct("<IQIIII")
_LENGTH = struct.Struct("<I")
_MASK = struct.Struct("<Q")
_T = TypeVar("_T")


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
class Sample:
    """One picture as it is trained on."""

    source: int  # index of its folder
    key: str  # path below the folder, with "/"
    bytes: int  # of the file
    width: int  # pixels of the picture, after EXIF orientation
    height: int
    placement: Placement
    captions: tuple[str, ...]  # one of them is drawn at each use; ("",) without one
    file: str = ""  # absolute path of the container or of itself; "": the key below the folder
    at: int = ALONE  # in the container
    mask: str = ""  # path of its mask below the source's folder of masks; "": no file


@frozen(kw_only=True, slots=True)
class Members:
    """The samples of one bucket: of one source and one size."""

    source: int
    width: int
    height: int
    samples: array[int]  # row numbers, ascending (type "Q")


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
        self._columns = _Columns()
        last: tuple[int, str, bool] | None = None
        for sample in sorted(samples, key=_place):
            if last == _place(sample):
                raise ValueError(f"the key {sample.key!r} stands twice in one source")
            last = _place(sample)
            self._columns.add(sample)

    def __len__(self) -> int:
        return len(self._columns.keys)

    def __getitem__(self, row: int) -> Sample:
        return self._columns.sample(row)

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def path(self, row: int) -> str:
        """The absolute path of the file of `row`, be it a container."""
        columns = self._columns
        if columns.file[row]:
            return columns.files[columns.file[row]]
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

    def caption_numbers(self, row: int) -> array[int]:
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
        return self._columns.masks.get(row, "")

    @property
    def captions(self) -> tuple[str, ...]:
        """Each distinct caption once, in the order of first use."""
        return tuple(self._columns.captions)

    @cached_property
    def buckets(self) -> tuple[Members, ...]:
        """All buckets, by source, then width, then height."""
        columns = self._columns
        found: dict[tuple[int, int, int], array[int]] = {}
        for row in range(len(self)):
            placed = columns.placements[columns.placement[row]]
            place = (columns.source[row], placed.width, placed.height)
            found.setdefault(place, array("Q")).append(row)
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
        placements = [
            hashlib.sha256(json.dumps(astuple(placement)).encode()).digest()
            for placement in columns.placements
        ]
        captions = [_framed(text.encode("utf-8", "surrogatepass")) for text in columns.captions]
        for row in range(len(self)):
            key, said = os.fsencode(columns.keys[row]), columns.caption_numbers(row)
            numbers = _ROW.pack(
                columns.source[row],
                columns.bytes[row],
                columns.width[row],
                columns.height[row],
                len(key),
                len(said),
            )
            state.update(numbers + placements[columns.placement[row]] + key)
            for number in said:
                state.update(captions[number])
        for row, mask in columns.masks.items():
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
        """Read what `save` wrote. Raises ManifestDamaged, and OSError where there is no file."""
        with open(path, encoding="ascii") as file:
            try:
                return cls._read(json.loads(line) for line in file)
            except (ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
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
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ManifestDamaged(f"{path}: not a whole manifest ({error})") from error
        return found

    def _places(self) -> str:
        """SHA-256 (hex) over what the digest leaves out: where each picture lies."""
        columns = self._columns
        state = hashlib.sha256(json.dumps([astuple(one) for one in self.folders]).encode())
        state.update(json.dumps(columns.files).encode())
        state.update(columns.file.tobytes() + columns.at.tobytes())
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
        yield from ([row, mask] for row, mask in columns.masks.items())
        for row in range(len(self)):
            yield [
                columns.source[row],
                columns.keys[row],
                columns.bytes[row],
                columns.width[row],
                columns.height[row],
                columns.placement[row],
                list(columns.caption_numbers(row)),
                columns.file[row],
                columns.at[row],
            ]
        if self.held_out is not None:
            yield from self.held_out._lines()

    @classmethod
    def _read(cls, lines: Iterator[Any]) -> Manifest:
        head = next(lines)
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']}, not {FORMAT}")
        folders = [
            Folder(id=i, path=p, kind=k, column=c) for i, p, k, c in _take(lines, head["folders"])
        ]
        names = [field.name for field in fields(Placement)]
        placements = [
            Placement(**dict(zip(names, values, strict=True)))
            for values in _take(lines, head["placements"])
        ]
        captions = list(_take(lines, head["captions"]))
        files = list(_take(lines, head["files"]))
        masks = dict(_take(lines, head.get("masks", 0)))
        manifest = cls(
            folders,
            (
                Sample(
                    source=source,
                    key=key,
                    bytes=size,
                    width=width,
                    height=height,
                    placement=placements[placement],
                    captions=tuple(captions[number] for number in said),
                    file=files[file],
                    at=at,
                    mask=masks.get(row, ""),
                )
                for row, (source, key, size, width, height, placement, said, file, at) in enumerate(
                    _take(lines, head["samples"])
                )
            ),
        )
        if manifest.digest != head["digest"]:
            raise ValueError("the rows do not have the digest that the head states")
        if manifest._places() != head["places"]:
            raise ValueError("the places are not those that the head states")
        if head.get("held_out", False):
            manifest.held_out = cls._read(lines)
        return manifest


def _place(sample: Sample) -> tuple[int, str, bool]:
    return sample.source, sample.key, sample.placement.mirrored


def _framed(data: bytes) -> bytes:
    """The length goes first, so that no two lists of texts give the same bytes."""
    return _LENGTH.pack(len(data)) + data


def _pass(file: IO[str], count: int) -> None:
    for _ in range(count):
        file.readline()


def _take(lines: Iterator[Any], count: int) -> Iterator[Any]:
    return islice(lines, count)


class _Columns:
    """The storage: about 110 bytes a row beside its key and what it shares with others."""

    def __init__(self) -> None:
        self.source = array("I")
        self.keys: list[str] = []
        self.bytes = array("Q")
        self.width = array("I")
        self.height = array("I")
        self.placement = array("I")
        self.first_caption = array("Q", [0])  # where each row's begin in the next, and the end
        self.caption = array("I")
        self.file = array("I")
        self.at = array("q")
        self.files: list[str] = [""]  # the first is that of pictures in folders
        self.placements: list[Placement] = []
        self.captions: list[str] = []
        self.masks: dict[int, str] = {}  # by row, ascending
        self._placement_numbers: dict[Placement, int] = {}
        self._caption_numbers: dict[str, int] = {}
        self._file_numbers: dict[str, int] = {"": 0}

    def add(self, sample: Sample) -> None:
        if sample.mask:
            self.masks[len(self.keys)] = sample.mask
        self.source.append(sample.source)
        self.keys.append(sample.key)
        self.bytes.append(sample.bytes)
        self.width.append(sample.width)
        self.height.append(sample.height)
        self.placement.append(_number(sample.placement, self.placements, self._placement_numbers))
        self.caption.extend(
            _number(text, self.captions, self._caption_numbers) for text in sample.captions
        )
        self.first_caption.append(len(self.caption))
        self.file.append(_number(sample.file, self.files, self._file_numbers))
        self.at.append(sample.at)

    def caption_numbers(self, row: int) -> array[int]:
        return self.caption[self.first_caption[row] : self.first_caption[row + 1]]

    def captions_of(self, row: int) -> tuple[str, ...]:
        return tuple(self.captions[number] for number in self.caption_numbers(row))

    def sample(self, row: int) -> Sample:
        return Sample(
            source=self.source[row],
            key=self.keys[row],
            bytes=self.bytes[row],
            width=self.width[row],
            height=self.height[row],
            placement=self.placements[self.placement[row]],
            captions=self.captions_of(row),
            file=self.files[self.file[row]],
            at=self.at[row],
            mask=self.masks.get(row, ""),
        )


def _number(value: _T, values: list[_T], numbers: dict[_T, int]) -> int:
    number = numbers.setdefault(value, len(values))
    if number == len(values):
        values.append(value)
    return number
