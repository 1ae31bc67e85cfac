"""What one container holds, as its reader found it, and how the index keeps it."""

from __future__ import annotations

import io
import json
import zlib
from typing import Any

from attrs import astuple, fields, frozen

from compiler.data.headers import Foreign, header_of
from compiler.data.quick_headers import Broken, Size
from compiler.data.scan import ALONE
from compiler.plan import Captions

PATH = "{path}"
"""Stands in a help for the path of the source, as the recipe says it."""


_RULES = {"webdataset": "webdataset, captions by sample"}
"""Names of kinds whose listings say more than they did at first: those of before are made again."""


class SourceUnfit(Exception):
    """A source that the recipe must describe otherwise.

    `code` is that of the diagnostic, `key` the recipe's key of the source that is to blame; `help`
    may hold PATH.
    """

    def __init__(self, code: str, message: str, *, help: str = "", key: str = "path") -> None:
        super().__init__(message)
        self.code, self.message, self.help, self.key = code, message, help, key


@frozen(kw_only=True)
class Wanted:
    """What is asked of a container. `image` "": the column is found by its name."""

    image: str
    captions: Captions

    @property
    def lines(self) -> bool:
        """Whether captions stand in the container."""
        return self.captions.kind in ("textfile", "json", "column")

    def spelt(self, kind: str) -> str:
        """Two equal texts ask the same: the index keeps listings by it."""
        said = self.captions
        rest = {
            "textfile": [],
            "json": [said.key],
            "column": [said.column, *said.fallback],
        }.get(said.kind)
        return json.dumps(
            [_RULES.get(kind, kind), self.image, said.kind if rest is not None else "", rest]
        )


@frozen(kw_only=True, slots=True)
class Entry:
    """One item: a picture inside (`at`), or one that is a file of its own or a URL (`file`)."""

    name: str = ""  # "": it has none
    at: int = ALONE
    bytes: int = 0
    width: int = 0  # pixels, after EXIF orientation
    height: int = 0
    why: str = ""  # what is wrong with it
    file: str = ""  # as the table says it
    lines: tuple[str, ...] = ()  # of its caption
    no_lines: str = ""  # why its caption can't be read


@frozen(kw_only=True)
class Listing:
    """One container. `faults` are (name, why), with the name "" for the container itself."""

    entries: tuple[Entry, ...] = ()
    faults: tuple[tuple[str, str], ...] = ()
    hidden: int = 0
    others: int = 0
    columns: tuple[str, ...] = ()  # that it has, as a person reads them
    image: str = ""  # the column that pictures were found in

    def packed(self) -> bytes:
        """For the index."""
        rows = [astuple(entry) for entry in self.entries]
        rest = [self.faults, self.hidden, self.others, self.columns, self.image]
        return zlib.compress(json.dumps([rows, *rest]).encode("ascii"), 1)

    @classmethod
    def unpacked(cls, data: bytes) -> Listing | None:
        """What `packed` made; None where it is damaged."""
        names = [field.name for field in fields(Entry)]
        try:
            rows, faults, hidden, others, columns, image = json.loads(zlib.decompress(data))
            return cls(
                entries=tuple(_entry(names, row) for row in rows),
                faults=tuple((name, why) for name, why in faults),
                hidden=hidden,
                others=others,
                columns=tuple(columns),
                image=image,
            )
        except (ValueError, TypeError, zlib.error):
            return None


def _entry(names: list[str], row: list[Any]) -> Entry:
    values = dict(zip(names, row, strict=True))
    values["lines"] = tuple(values["lines"])
    return Entry(**values)


def sized(name: str, data: bytes, **rest: Any) -> Entry | None:
    """The entry of embedded bytes; None where they are no picture and do not claim to be."""
    found = header_of(name, io.BytesIO(data), len(data))
    if isinstance(found, Foreign):
        return None
    if isinstance(found, Size):
        return Entry(name=name, bytes=len(data), width=found.width, height=found.height, **rest)
    assert isinstance(found, Broken)
    return Entry(name=name, bytes=len(data), why=found.why, **rest)
