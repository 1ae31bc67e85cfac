"""Where captions come from.

    textfile   the file beside the picture with the same name and the suffix `.txt`, UTF-8 with or
               without a byte order mark. "join": all of it is one caption. "first": its first
               line that is not blank.
    filename   the picture's name without suffix: `_` becomes a space; a counter is dropped, which
               is a number at the end behind a space, `_` or `-` or in parentheses ("a dog_007",
               "a dog (2)") and a zero-padded number at the front ("007_a dog"); dashes and other
               numbers stay ("close-up of 2 dogs"). A name without any letter has no caption.
    instance   the same prompt for every picture.

In every caption each run of white space, line breaks included, becomes one space, and none is left
at the ends: two captions that differ only in spacing are the same caption.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from compiler.data.scan import Fault
from compiler.plan import Captions

MAX_BYTES = 1 << 20
"""A longer text file is not a caption."""

_COUNTER = re.compile(r"(?:[\s_-]+\d+|[\s_-]*\(\d+\))$")
_FRONT = re.compile(r"^0\d*[\s_-]+")


def caption(folder: str, key: str, captions: Captions) -> str | Fault:
    """The caption of the picture `key` below `folder`; "" where there is none or an empty one."""
    if captions.kind == "instance":
        return tidy(captions.prompt)
    if captions.kind == "filename":
        return from_name(key)
    return _from_textfile(os.path.splitext(os.path.join(folder, key))[0] + ".txt", captions)


def caption_all(folder: str, keys: Sequence[str], captions: Captions) -> list[str | Fault]:
    """`caption` of each key, in order."""
    return [caption(folder, key, captions) for key in keys]


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


def _from_textfile(path: str, captions: Captions) -> str | Fault:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return Fault(path=path, why=f"can't be read: {error.strerror or error}")
    if len(data) > MAX_BYTES:
        return Fault(path=path, why=f"longer than {MAX_BYTES:,} bytes: this is no caption")
    text = _decoded(data)
    if text is None or "\0" in text:
        return Fault(path=path, why=f"not UTF-8 text{_guess(data)}")
    if captions.multiline == "first":
        text = next((line for line in text.splitlines() if line.strip()), "")
    return tidy(text)


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _guess(data: bytes) -> str:
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:2]
    return " (it looks like UTF-16; save it as UTF-8)" if utf16 else ""
