"""Tables of paths or URLs: JSON lines (`.jsonl`, `.ndjson`), `.csv` and `.tsv`, in UTF-8.

Each row names one picture by a path, relative to the table, or by a URL, and holds its caption in
another column. A row that can't be read is a fault like a broken picture.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from typing import IO, Any

from compiler.data.sources.columns import IMAGES, with_lines
from compiler.data.sources.listing import Entry, Listing, SourceUnfit, Wanted
from compiler.files import at_once

MAX_LINE = 16 * 2**20
"""Bytes; a longer line is no row of a table."""
PATHS = tuple(name for name in IMAGES if name not in ("bytes", "content", "image_bytes"))

Row = tuple[int, dict[str, Any] | str]
"""A line's number, and its row or what is wrong with it."""


def list_table(path: str, wanted: Wanted) -> Listing:
    """All rows of the table at `path`. Raises OSError, and SourceUnfit where it is no table or
    lacks a column."""
    lines = _csv if path.lower().endswith((".csv", ".tsv")) else _json_lines
    with open(path, "rb", opener=at_once) as file:
        rows = list(lines(path, file))
    columns = tuple(
        dict.fromkeys(name for _, row in rows if not isinstance(row, str) for name in row)
    )
    image = _image(path, columns, wanted.image) if columns else ""
    asked = _asked(path, columns, wanted) if columns else []
    entries, faults = [], []
    for number, row in rows:
        if isinstance(row, str):
            faults.append((f"line {number}", row))
            continue
        value = row.get(image)
        if not isinstance(value, str) or not value.strip():
            faults.append((f"line {number}", f"no path or URL under `{image}`"))
            continue
        told = [(name, row.get(name)) for name in asked]
        entries.append(with_lines(Entry(name=value.strip(), file=value.strip()), told))
    return Listing(entries=tuple(entries), faults=tuple(faults), columns=columns, image=image)


def _image(path: str, columns: tuple[str, ...], asked: str) -> str:
    by_name = {name.lower(): name for name in reversed(columns)}
    found = [asked] if asked in columns else [by_name[n] for n in PATHS if n in by_name]
    if not found or (asked and asked not in columns):
        what = f"column `{asked}`" if asked else "column that is known to hold paths or URLs"
        raise SourceUnfit(
            "wrong-column",
            f"`{os.path.basename(path)}` has no {what}",
            help=_columns_of(columns) + ("" if asked else '\nsay which one: image = "..."'),
            key="image" if asked else "path",
        )
    return found[0]


def _asked(path: str, columns: tuple[str, ...], wanted: Wanted) -> list[str]:
    """The columns of captions, which must all be there."""
    if wanted.captions.kind != "column":
        return []
    asked = [wanted.captions.column, *wanted.captions.fallback]
    for at, name in enumerate(asked):
        if name not in columns:
            raise SourceUnfit(
                "wrong-column",
                f"`{os.path.basename(path)}` has no column `{name}`",
                help=_columns_of(columns),
                key="captions.fallback" if at else "captions.column",
            )
    return asked


def _columns_of(columns: tuple[str, ...]) -> str:
    return "it has " + ", ".join(f"`{name}`" for name in columns)


def _json_lines(path: str, file: IO[bytes]) -> Iterator[Row]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise _unfit(path, f"line {number} is longer than {MAX_LINE >> 20} MiB")
        if line.strip() and (number > 1 or line.strip() != b"\xef\xbb\xbf"):
            yield number, _json_row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _json_row(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else "not a JSON object"


def _csv(path: str, file: IO[bytes]) -> Iterator[Row]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter="\t" if path.lower().endswith(".tsv") else ",")
    try:
        head = next(reader, [])
        if len(set(head)) < len(head):
            raise _unfit(path, "a column's name stands twice in its first line")
        for row in reader:
            if row:
                yield (
                    reader.line_num,
                    dict(zip(head, row, strict=True))
                    if len(row) == len(head)
                    else f"{len(row)} values for {len(head)} columns",
                )
    except UnicodeDecodeError:
        raise _unfit(path, "it is not UTF-8 text") from None
    except csv.Error as error:
        raise _unfit(path, f"line {reader.line_num}: {error}") from None


def _unfit(path: str, why: str) -> SourceUnfit:
    return SourceUnfit("unreadable-source", f"`{os.path.basename(path)}` can't be read: {why}")
