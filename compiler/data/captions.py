"""Where captions come from.

    textfile   the file beside the picture with the same name and the suffix `.txt`, UTF-8 with or
               without a byte order mark
    filename   the picture's name without suffix: `_` becomes a space; a counter is dropped, which
               is a number at the end behind a space, `_` or `-` or in parentheses ("a dog_007",
               "a dog (2)") and a zero-padded number at the front ("007_a dog"); dashes and other
               numbers stay ("close-up of 2 dogs"). A name without any letter has no caption.
    instance   the same prompt for every picture
    json       the file beside the picture with the same name and the suffix `.json`: an object
               that holds, under `key`, one text or a list of texts
    column     of a table or a shard: the text, or list of texts, in the column `column` of the
               picture's row; where that says nothing, the first of `fallback` that does

In a tar, files beside the picture are the members of its name.

The lines of a text and the texts of a list are treated alike. "join": all of them are one caption.
"first": the first that is not blank. "alternatives": each is a caption of its own, equal ones
count once, and every use of the picture takes one of them.

In every caption each run of white space, line breaks included, becomes one space, and none is left
at the ends: two captions that differ only in spacing are the same caption.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from compiler.data.scan import ALONE, Fault, Picture, Scan
from compiler.files import at_once
from compiler.plan import Captions

MAX_BYTES = 1 << 20
"""A longer text file is not a caption."""

COMPANION = {"textfile": ".txt", "json": ".json"}
"""The ending of the file beside a picture that holds its caption."""

_COUNTER = re.compile(r"(?:[\s_-]+\d+|[\s_-]*\(\d+\))$")
_FRONT = re.compile(r"^0\d*[\s_-]+")


def captions_of(folder: str, key: str, captions: Captions) -> tuple[str, ...] | Fault:
    """The captions of the picture `key` below `folder`: none empty; () where there is none."""
    if captions.kind == "instance":
        return _spoken([captions.prompt])
    if captions.kind == "filename":
        return _spoken([from_name(key)])
    beside = os.path.splitext(os.path.join(folder, key))[0] + COMPANION[captions.kind]
    data = _read(beside)
    if isinstance(data, Fault):
        return data
    if captions.kind == "json":
        lines = lines_of_json(data, captions.key, beside)
    else:
        lines = lines_of_text(data, beside)
    return lines if isinstance(lines, Fault) else chosen(lines, captions.multiline)


def all_captions(
    folder: str, found: Scan, pictures: Sequence[Picture], captions: Captions
) -> list[tuple[str, ...] | Fault]:
    """The captions of each of the `pictures` that were found, in order; as `captions_of`."""
    if found.lines is None or captions.kind not in (*COMPANION, "column"):
        return [captions_of(folder, picture.key, captions) for picture in pictures]
    texts: list[tuple[str, ...] | Fault] = []
    for picture in pictures:
        lines = found.lines.get(picture.key, ())
        if captions.kind in COMPANION and picture.at == ALONE:  # a table's: beside the file
            texts.append(captions_of("", picture.file, captions))
        else:
            texts.append(lines if isinstance(lines, Fault) else chosen(lines, captions.multiline))
    return texts


def tidy(text: str) -> str:
    """`text` with single spaces."""
    return " ".join(text.split())


def from_name(key: str) -> str:
    """The caption that a picture's own name holds; "" if it holds none."""
    name = os.path.splitext(key.rpartition("/")[2])[0]
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    name = _FRONT.sub("", _COUNTER.sub("", name))
    return tidy(name.replace("_", " ")) if any(c.isalpha() for c in name) else ""


def chosen(lines: Sequence[str], multiline: str) -> tuple[str, ...]:
    """The captions in `lines`: none empty."""
    if multiline == "join":
        return _spoken([" ".join(lines)])
    found = _spoken(lines)
    return found[:1] if multiline == "first" else found


def _spoken(lines: Sequence[str]) -> tuple[str, ...]:
    """The lines that say something, tidy, each once."""
    return tuple(dict.fromkeys(text for line in lines if (text := tidy(line))))


def lines_of_text(data: bytes, path: str) -> list[str] | Fault:
    """The lines of a text file's content."""
    text = _text(data, path)
    return text if isinstance(text, Fault) else text.splitlines()


def lines_of_json(data: bytes, key: str, path: str) -> list[str] | Fault:
    """The lines under `key` in a JSON file's content."""
    text = _text(data, path)
    if isinstance(text, Fault) or not text:
        return text if isinstance(text, Fault) else []
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Fault(path=path, why=f"not JSON: {error}")
    if not isinstance(value, dict):
        return Fault(path=path, why="not a JSON object")
    return lines_of_value(value.get(key), key, path)


def lines_of_value(value: Any, key: str, path: str) -> list[str] | Fault:
    """The lines of what stands under `key`: a text, a list of texts, or nothing."""
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, str) for one in texts):
        return Fault(path=path, why=f"`{key}` is neither a text nor a list of texts")
    lines = [line for one in texts for line in one.splitlines()]
    if not all(_is_text(line) for line in lines):
        return Fault(path=path, why=f"`{key}` holds characters that are no text")
    return lines


def _read(path: str) -> bytes | Fault:
    """What the file holds; nothing where there is none."""
    try:
        with open(path, "rb", opener=at_once) as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        return Fault(path=path, why=f"can't be read: {error.strerror or error}")
    if len(data) > MAX_BYTES:
        return Fault(path=path, why=f"longer than {MAX_BYTES:,} bytes: this is no caption")
    return data


def _text(data: bytes, path: str) -> str | Fault:
    text = _decoded(data)
    if text is None or "\0" in text:
        return Fault(path=path, why=f"not UTF-8 text{_guess(data)}")
    return text


def _is_text(text: str) -> bool:
    """JSON's escapes may spell a null character, or half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _guess(data: bytes) -> str:
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:2]
    return " (it looks like UTF-16; save it as UTF-8)" if utf16 else ""
