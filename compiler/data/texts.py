"""Many texts in a few buffers: about eight bytes a text beside what it says."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias, overload

from compiler.data.nameless import Bytes, Growing

Numbers: TypeAlias = "array[int] | memoryview"
"""Whole numbers of one size, in memory or mapped."""


class Texts(Sequence[str]):
    """Texts, of which any may hold lone surrogates, as names that are not UTF-8 do."""

    def __init__(self, ends: Numbers, data: Bytes) -> None:
        """`ends` says of each text where it ends in `data`, which is UTF-8."""
        self.ends, self.data = ends, data

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        return decoded(self.raw(number))

    def __iter__(self) -> Iterator[str]:
        return map(decoded, self.raws())

    def raws(self) -> Iterator[bytes]:
        """The UTF-8 of each, as `raw`."""
        start = 0
        for end in self.ends:
            yield bytes(self.data[start:end])
            start = end

    def raw(self, number: int) -> bytes:
        """The text's UTF-8, lone surrogates included. Raises IndexError."""
        if not 0 <= number < len(self.ends):
            raise IndexError(number)
        start = self.ends[number - 1] if number else 0
        return bytes(self.data[start : self.ends[number]])


def decoded(raw: bytes) -> str:
    """The text of its UTF-8, lone surrogates included."""
    return raw.decode("utf-8", "surrogatepass")


class GrowingTexts:
    """Texts to which others are added; see `nameless.Growing`."""

    def __init__(self, folder: Path | None = None) -> None:
        self._numbers, self._text = array("Q"), bytearray()
        self._ends, self._data = Growing(self._numbers, folder), Growing(self._text, folder)
        self.count = 0

    def add(self, text: str) -> None:
        """Add one behind the others."""
        self._text += text.encode("utf-8", "surrogatepass")
        self._numbers.append(self._data.written + len(self._text))
        self.count += 1
        self._ends.relieve()
        self._data.relieve()

    def texts(self) -> Texts:
        """All of them; nothing more may be added."""
        return Texts(self._ends.whole().cast("Q"), self._data.whole())
