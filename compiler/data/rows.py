"""How a manifest holds its rows: in columns, because there may be millions of them.

Numbers are 52 bytes a row; keys, captions and placements lie in buffers beside them, captions and
placements once each however many pictures share them. All of it can lie on the disk (`mapped`).
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from attrs import frozen

from compiler.data.geometry import Focus, Placement
from compiler.data.nameless import Bytes, Growing, mapped
from compiler.data.scan import ALONE
from compiler.data.texts import GrowingTexts, Numbers, Texts

_PLACEMENT = struct.Struct("<6I2B")
_PLACED = ("resize_width", "resize_height", "crop_x", "crop_y", "width", "height")
_FOCUS = get_args(Focus)
_NUMBERS: dict[str, Literal["I", "q", "Q"]] = {
    "source": "I",
    "bytes": "Q",
    "width": "I",
    "height": "I",
    "placement": "I",
    "first_caption": "Q",
    "caption": "I",
    "file": "I",
    "at": "q",
    "masked": "Q",
}  # the columns with the C types of their numbers
_TEXTS = ("keys", "captions", "files", "masks")
_LOOKED_AT = 256  # rows after which it is looked whether they are long
_T = TypeVar("_T")


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


class Placements(Sequence[Placement]):
    """Placements, packed."""

    def __init__(self, data: Bytes) -> None:
        self.data = data
        self._unpacked = lru_cache(maxsize=256)(self._unpack)

    def __len__(self) -> int:
        return len(self.data) // _PLACEMENT.size

    def __getitem__(self, number: int) -> Placement:  # type: ignore[override]  # no slices
        return self._unpacked(number)

    def _unpack(self, number: int) -> Placement:
        if not 0 <= number < len(self):
            raise IndexError(number)
        *sizes, mirrored, focus = _PLACEMENT.unpack_from(self.data, number * _PLACEMENT.size)
        values = dict(zip(_PLACED, sizes, strict=True))
        return Placement(**values, mirrored=bool(mirrored), focus=_FOCUS[focus])


def packed(placement: Placement) -> bytes:
    """A placement's bytes. Raises struct.error and ValueError where it is none."""
    sizes = (getattr(placement, name) for name in _PLACED)
    return _PLACEMENT.pack(*sizes, placement.mirrored, _FOCUS.index(placement.focus))


@frozen(kw_only=True)
class Columns:
    """All rows."""

    source: Numbers
    bytes: Numbers
    width: Numbers
    height: Numbers
    placement: Numbers
    first_caption: Numbers  # where each row's begin in the next, and the end
    caption: Numbers
    file: Numbers
    at: Numbers
    masked: Numbers  # rows with a mask, ascending
    keys: Texts
    captions: Texts
    files: Texts  # the first is that of pictures in folders
    masks: Texts  # of the rows `masked`
    placements: Placements

    def __len__(self) -> int:
        return len(self.keys)

    def caption_numbers(self, row: int) -> list[int]:
        """Where the captions of `row` stand in `captions`."""
        return self.caption[self.first_caption[row] : self.first_caption[row + 1]].tolist()

    def captions_of(self, row: int) -> tuple[str, ...]:
        """The captions of `row`."""
        return tuple(self.captions[number] for number in self.caption_numbers(row))

    def mask(self, row: int) -> str:
        """The mask of `row`; "" without one."""
        number = bisect_left(self.masked, row)
        there = number < len(self.masked) and self.masked[number] == row
        return self.masks[number] if there else ""

    def sample(self, row: int) -> Sample:
        """All of one row."""
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
            mask=self.mask(row),
        )

    def mapped(self, folder: Path) -> Columns:
        """The same, in a nameless file in `folder`. Raises OSError."""
        texts = [getattr(self, name) for name in _TEXTS]
        buffers = [memoryview(getattr(self, name)) for name in _NUMBERS]
        buffers += [memoryview(each) for text in texts for each in (text.ends, text.data)]
        found = iter(mapped([*buffers, self.placements.data], folder))
        made: dict[str, Any] = {name: next(found).cast(code) for name, code in _NUMBERS.items()}
        made |= {name: Texts(next(found).cast("Q"), next(found)) for name in _TEXTS}
        return Columns(**made, placements=Placements(next(found)))


class GrowingRows:
    """Rows to which others are added; see `nameless.Growing`."""

    def __init__(self, folder: Path | None = None) -> None:
        self._numbers = {name: array(code) for name, code in _NUMBERS.items()}
        self._numbers["first_caption"].append(0)
        self._texts = {name: GrowingTexts(folder) for name in _TEXTS}
        self._placements = bytearray()
        self._growing = {name: Growing(held, folder) for name, held in self._numbers.items()}
        self._placed = Growing(self._placements, folder)
        self._said = 0  # captions of all rows

    def add_placement(self, placement: Placement) -> None:
        """Add one behind the others, which rows then name by its number."""
        self._placements += packed(placement)
        self._placed.relieve()

    def add_caption(self, caption: str) -> None:
        """As `add_placement`."""
        self._texts["captions"].add(caption)

    def add_file(self, file: str) -> None:
        """As `add_placement`; the first is to be "", that of pictures in folders."""
        self._texts["files"].add(file)

    def add_mask(self, row: int, mask: str) -> None:
        """Say what the mask of `row` is, which need not be there yet; rows ascend."""
        self._numbers["masked"].append(row)
        self._growing["masked"].relieve()
        self._texts["masks"].add(mask)

    def add(
        self,
        source: int,
        key: str,
        length: int,
        width: int,
        height: int,
        placement: int,
        captions: Iterable[int],
        file: int,
        at: int,
        mask: str = "",
    ) -> None:
        """Add a row: a sample, with numbers for what it shares."""
        if mask:
            self.add_mask(self._texts["keys"].count, mask)
        self._texts["keys"].add(key)
        numbers = self._numbers
        numbers["source"].append(source)
        numbers["bytes"].append(length)
        numbers["width"].append(width)
        numbers["height"].append(height)
        numbers["placement"].append(placement)
        before = len(numbers["caption"])
        numbers["caption"].extend(captions)
        self._said += len(numbers["caption"]) - before
        numbers["first_caption"].append(self._said)
        numbers["file"].append(file)
        numbers["at"].append(at)
        if not self._texts["keys"].count % _LOOKED_AT:
            for growing in self._growing.values():
                growing.relieve()

    def columns(self) -> Columns:
        """What was added; nothing more may be."""
        made: dict[str, Any] = {
            name: growing.whole().cast(_NUMBERS[name]) for name, growing in self._growing.items()
        }
        made |= {name: texts.texts() for name, texts in self._texts.items()}
        return Columns(**made, placements=Placements(self._placed.whole()))


def columns_of(samples: Iterable[Sample]) -> Columns:
    """Samples as rows, in their order."""
    rows = GrowingRows()
    placements: dict[Placement, int] = {}
    captions: dict[str, int] = {}
    files: dict[str, int] = {}
    _number("", files, rows.add_file)
    for sample in samples:
        rows.add(
            sample.source,
            sample.key,
            sample.bytes,
            sample.width,
            sample.height,
            _number(sample.placement, placements, rows.add_placement),
            [_number(caption, captions, rows.add_caption) for caption in sample.captions],
            _number(sample.file, files, rows.add_file),
            sample.at,
            sample.mask,
        )
    return rows.columns()


def _number(value: _T, numbers: dict[_T, int], add: Callable[[_T], None]) -> int:
    """The number of `value`, which is added where it is new."""
    number = numbers.get(value)
    if number is None:
        number = numbers[value] = len(numbers)
        add(value)
    return number
