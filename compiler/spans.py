"""Where each key and value of a TOML text stands: a scanner beside `tomllib`.

`tomllib` decides what is valid and what it means; this walks the same text and only notes
offsets. It is lenient, never raises, and stops at the first thing it cannot walk over, so it
also tells `compiler.syntax` which statement and bracket a syntax error is in.
"""

import re
import tomllib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from compiler.diagnostics import Span

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the root: `("data", "source", 0, "repeats")`."""
Extent = tuple[int, int]
"""Offsets of the first character and of the one after the last."""

MAX_DEPTH = 32
MAX_VALUES = 20_000
"""Values and headers; beyond these a file is no recipe, and reading it takes seconds."""
MAX_NUMBER = 400
"""Characters of a number: `int` refuses more than 4300 digits, and nobody means even these."""

_SPACE = re.compile(r"[ \t]*+")
_BLANK = re.compile(r"(?:[ \t\n]++|#[^\n]*+)*+")
_BARE = re.compile(r"[A-Za-z0-9_-]++")
_BASIC = re.compile(r'"(?:[^"\\\n]|\\[^\n])*+"')
_LITERAL = re.compile(r"'[^'\n]*+'")
_LONG_BASIC = re.compile(r'"""(?:[^"\\]|\\.|"{1,2}(?!"))*+"{3,5}', re.S)
_LONG_LITERAL = re.compile(r"'''(?:[^']|'{1,2}(?!'))*+'{3,5}")
_SCALAR = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[^\s,\]}#]*+|[^\s,\[\]{}#\"'=]++", re.A
)


class Statement(NamedTuple):
    """One `key = value` or header."""

    start: int
    end: int
    path: KeyPath
    key: Extent
    """The key with all its dotted parts."""
    is_header: bool


class Double(NamedTuple):
    """A key given twice in one inline table."""

    name: str
    first: Extent
    second: Extent


class _Bad(Exception):
    """The scanner cannot go on; it stays at the offending character."""


class Scan:
    """What a walk over a text found, by offsets; see `scan`."""

    __slots__ = (
        "counts", "doubles", "failed", "first", "keys", "opened", "pos", "prefix",
        "statements", "tables", "text", "too_deep", "too_long", "too_many", "values",
    )  # fmt: skip

    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0
        self.prefix: KeyPath = ()
        self.counts: dict[KeyPath, int] = {}
        self.keys: dict[KeyPath, Extent] = {}
        self.first: dict[KeyPath, Extent] = {}
        """First mention of each path; `keys` prefers the explicit header."""
        self.values: dict[KeyPath, Extent] = {}
        self.tables: dict[KeyPath, Extent] = {}
        self.statements: list[Statement] = []
        self.doubles: list[Double] = []
        self.opened: list[int] = []
        """Where the brackets and strings begin that were open when the walk stopped."""
        self.failed: Statement | None = None
        self.too_deep: int | None = None
        self.too_many: int | None = None
        self.too_long: list[Extent] = []


class Lines:
    """Offsets of a text as lines and columns."""

    __slots__ = ("starts",)

    def __init__(self, text: str) -> None:
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def place(self, offset: int) -> tuple[int, int]:
        """Line and column, 1-based."""
        line = bisect_right(self.starts, offset)
        return line, offset - self.starts[line - 1] + 1

    def span(self, file: str, extent: Extent) -> Span:
        """The span of a stretch of the text."""
        line, column = self.place(extent[0])
        end_line, end_column = self.place(extent[1])
        return Span(file=file, line=line, column=column, end_line=end_line, end_column=end_column)


class SpanMap(Mapping[KeyPath, Span]):
    """Spans by path, each made when it is asked for; a plan asks for few of them."""

    __slots__ = ("_extents", "_file", "_lines")

    def __init__(self, extents: Mapping[KeyPath, Extent], lines: Lines, file: str) -> None:
        self._extents = extents
        self._lines = lines
        self._file = file

    def __getitem__(self, path: KeyPath) -> Span:
        return self._lines.span(self._file, self._extents[path])

    def __contains__(self, path: object) -> bool:
        return path in self._extents

    def __iter__(self) -> Iterator[KeyPath]:
        return iter(self._extents)

    def __len__(self) -> int:
        return len(self._extents)


def scan(text: str) -> Scan:
    """Walk over a text, whose lines end in a line feed, as far as it is well formed."""
    found = Scan(text)
    while True:
        _skip(found, _BLANK)
        if found.pos >= len(text):
            return found
        found.opened.clear()
        start = found.pos
        try:
            _statement(found, start)
        except _Bad:
            found.failed = Statement(start, found.pos, (), (start, start), text[start] == "[")
            return found


def _statement(found: Scan, start: int) -> None:
    header = found.text[start] == "["
    _count(found)
    path, key = _header(found) if header else _pair(found, found.prefix)
    found.statements.append(Statement(start, found.pos, path, key, header))
    _skip(found, _SPACE)
    if found.text[found.pos : found.pos + 1] not in ("", "\n", "#"):
        raise _Bad


def _header(found: Scan) -> tuple[KeyPath, Extent]:
    start = found.pos
    is_list = found.text.startswith("[[", start)
    found.opened.append(start)
    found.pos += 1 + is_list
    _skip(found, _SPACE)
    parts = _key(found)
    key = (parts[0][1][0], parts[-1][1][1])
    _expect(found, "]]" if is_list else "]")
    found.opened.pop()
    path = _resolve(found, parts, is_list)
    _note_path(found, (), path, parts)
    found.keys[path] = parts[-1][1]
    if is_list:
        entries = found.counts.get(path, 0)
        found.counts[path] = entries + 1
        path = (*path, entries)
        found.keys[path] = found.first[path] = parts[-1][1]
    found.tables.setdefault(path, (start, found.pos))
    found.prefix = path
    return path, key


def _resolve(found: Scan, parts: list[tuple[str, Extent]], is_list: bool) -> KeyPath:
    """The path of a header: a name of an array of tables means its latest entry."""
    path: KeyPath = ()
    for at, (name, _) in enumerate(parts):
        path = (*path, name)
        last = at == len(parts) - 1
        if path in found.counts and not last:
            path = (*path, found.counts[path] - 1)
    return path


def _note_path(
    found: Scan, prefix: KeyPath, path: KeyPath, parts: list[tuple[str, Extent]]
) -> None:
    """Note the place of each part of a dotted key."""
    names = iter(parts)
    for at in range(len(prefix), len(path)):
        if isinstance(path[at], int):
            continue
        extent = next(names)[1]
        found.keys.setdefault(path[: at + 1], extent)
        found.first.setdefault(path[: at + 1], extent)


def _pair(found: Scan, prefix: KeyPath) -> tuple[KeyPath, Extent]:
    """`key = value`, in a table or an inline table."""
    parts = _key(found)
    path: KeyPath = (*prefix, *(name for name, _ in parts))
    if len(path) > MAX_DEPTH:
        _too_deep(found)
    _expect(found, "=")
    _skip(found, _SPACE)
    known = found.first.get(path)
    if known is not None and found.opened:
        found.doubles.append(Double(parts[-1][0], known, parts[-1][1]))
    _note_path(found, prefix, path, parts)
    _value(found, path)
    return path, (parts[0][1][0], parts[-1][1][1])


def _key(found: Scan) -> list[tuple[str, Extent]]:
    """The parts of a bare, quoted or dotted key; leaves the position after trailing blanks."""
    parts: list[tuple[str, Extent]] = []
    while True:
        parts.append(_key_part(found))
        if len(parts) > MAX_DEPTH:
            _too_deep(found)
        _skip(found, _SPACE)
        if not found.text.startswith(".", found.pos):
            return parts
        found.pos += 1
        _skip(found, _SPACE)


def _key_part(found: Scan) -> tuple[str, Extent]:
    start = found.pos
    for pattern in (_BARE, _BASIC, _LITERAL):
        match = pattern.match(found.text, start)
        if match:
            found.pos = match.end()
            token = match[0]
            name = _unquote(token) if pattern is _BASIC else token.strip("'")
            return name, (start, found.pos)
    if found.text[start : start + 1] in ('"', "'"):
        found.opened.append(start)
    raise _Bad


def _unquote(token: str) -> str:
    if "\\" not in token:
        return token[1:-1]
    try:
        return str(tomllib.loads(f"k={token}")["k"])
    except tomllib.TOMLDecodeError:
        raise _Bad from None


def _value(found: Scan, path: KeyPath) -> None:
    if len(path) > MAX_DEPTH:
        _too_deep(found)
    _count(found)
    start = found.pos
    char = found.text[start : start + 1]
    if char == "[":
        _array(found, path)
    elif char == "{":
        _inline_table(found, path)
    elif char in ('"', "'"):
        _string(found, char)
    else:
        _scalar(found)
    found.values.setdefault(path, (start, found.pos))


def _array(found: Scan, path: KeyPath) -> None:
    found.opened.append(found.pos)
    found.pos += 1
    index = 0
    while True:
        _skip(found, _BLANK)
        if _take(found, "]"):
            break
        _value(found, (*path, index))
        index += 1
        _skip(found, _BLANK)
        if not _take(found, ","):
            _expect(found, "]")
            break
    found.opened.pop()


def _inline_table(found: Scan, path: KeyPath) -> None:
    found.opened.append(found.pos)
    found.pos += 1
    while True:
        _skip(found, _BLANK)
        if _take(found, "}"):
            break
        _pair(found, path)
        _skip(found, _BLANK)
        if not _take(found, ","):
            _expect(found, "}")
            break
    found.opened.pop()


def _string(found: Scan, quote: str) -> None:
    long = found.text.startswith(quote * 3, found.pos)
    if quote == '"':
        pattern = _LONG_BASIC if long else _BASIC
    else:
        pattern = _LONG_LITERAL if long else _LITERAL
    match = pattern.match(found.text, found.pos)
    if match is None:
        found.opened.append(found.pos)
        raise _Bad
    found.pos = match.end()


def _scalar(found: Scan) -> None:
    match = _SCALAR.match(found.text, found.pos)
    if match is None:
        raise _Bad
    if len(match[0]) > MAX_NUMBER and match[0][:1] in "+-0123456789":
        found.too_long.append(match.span())
    found.pos = match.end()


def _skip(found: Scan, pattern: re.Pattern[str]) -> None:
    match = pattern.match(found.text, found.pos)
    if match is not None:
        found.pos = match.end()


def _take(found: Scan, token: str) -> bool:
    taken = found.text.startswith(token, found.pos)
    found.pos += len(token) * taken
    return taken


def _expect(found: Scan, token: str) -> None:
    if not _take(found, token):
        raise _Bad


def _count(found: Scan) -> None:
    if len(found.values) + len(found.tables) >= MAX_VALUES:
        found.too_many = found.pos
        raise _Bad


def _too_deep(found: Scan) -> None:
    found.too_deep = found.pos
    raise _Bad
