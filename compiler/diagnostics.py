"""What a user did wrong or should know: as data (`Diagnostic`), as text (`render`), as JSON.

A diagnostic carries facts; text is made last, here. Positions are 1-based and count characters
(code points); the end is exclusive. Rendered text is at most 80 columns wide, so it reads the
same in a terminal, in a pipe and in a CI log; colour is only ever added around finished text.
"""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs

Severity = Literal["error", "warning", "note"]
Style = Callable[[str, str], str]
"""Decorates finished text: `(role, text) -> text`.

Roles: `error`, `warning`, `note`, `message`, `path`, `gutter`, `caret`, `label`, `help`.
"""

WIDTH = 80
TAB = 4
MIN_TEXT = 20  # columns of source that stay even beside an absurd line number
WIDEST_TOKEN = 40
_LIMITS = ((1, 0), (4, 1), (8, 2))  # length of a name -> edits that are still a typing error


@attrs.frozen(kw_only=True)
class Span:
    """A stretch of a file; lines and columns are 1-based, columns count characters."""

    file: str
    line: int
    column: int
    end_line: int
    end_column: int
    """Column after the last character."""


@attrs.frozen(kw_only=True)
class Diagnostic:
    """One mistake, one message."""

    code: str
    """Stable, kebab-case; `tuner explain CODE` knows it."""
    severity: Severity = "error"
    message: str
    """One lower-case sentence without a period; literals stand in backticks."""
    span: Span | None = None
    label: str = ""
    """A few words beside the carets."""
    help: str = ""
    """What to do; may hold line breaks, so that a piece of TOML can be pasted."""
    path: str = ""
    """Dotted path of the key to blame, as `data.source[1].repeats`."""
    notes: tuple[str, ...] = ()
    meant: str = ""
    """Dotted path of the key that an unknown one was probably meant to be."""
    excerpt: str = ""
    """The span's source line, where the text of the file cannot be had otherwise."""


def plain(role: str, text: str) -> str:
    """Style that adds nothing."""
    return text


def render(diagnostic: Diagnostic, texts: Mapping[str, str], style: Style = plain) -> str:
    """Text of a diagnostic, at most 80 columns wide, without a final line break.

    `texts` maps file names to their text (`Source.texts`, `Merged.texts`); a file that is not
    there is named but not quoted. A name of a file is never wrapped, so that it can be clicked.
    """
    head = f"{diagnostic.severity}[{diagnostic.code}]"
    first, *rest = _wrap(f"{head}: {safe(diagnostic.message)}", "", "  ")
    lines = [style(diagnostic.severity, head) + style("message", first.removeprefix(head))]
    lines += [style("message", line) for line in rest]
    if diagnostic.span is not None:
        lines += _quote(diagnostic, diagnostic.span, texts, style)
    for note in diagnostic.notes:
        lines += _remark("note", note, style)
    if diagnostic.help:
        lines += _remark("help", diagnostic.help, style)
    return "\n".join(lines)


def to_json(diagnostic: Diagnostic, texts: Mapping[str, str]) -> dict[str, Any]:
    """A diagnostic as plain data.

    `start` and `end` are positions as the Language Server Protocol has them by default, or null:
    0-based, in UTF-16 code units, the end exclusive. A character beyond U+FFFF counts twice, so
    `texts` (see `render`) is needed to count.
    """
    span = diagnostic.span
    place: dict[str, Any] = {"file": None, "start": None, "end": None}
    if span is not None:
        place = {
            "file": span.file,
            "start": _position(diagnostic, span.line, span.column, texts),
            "end": _position(diagnostic, span.end_line, span.end_column, texts),
        }
    facts: dict[str, Any] = {
        "code": diagnostic.code,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        "help": diagnostic.help,
        "path": diagnostic.path,
    }
    return facts | place


def _position(
    diagnostic: Diagnostic, line: int, column: int, texts: Mapping[str, str]
) -> dict[str, int]:
    """A place in UTF-16 code units; `column` is 1-based and counts characters."""
    span = diagnostic.span
    assert span is not None
    known = span.file in texts
    text = _line(texts[span.file], line) if known else diagnostic.excerpt
    before = text[: column - 1]
    wide = sum(char > "\uffff" for char in before)
    return {"line": line - 1, "character": column - 1 + wide}


def sort_diagnostics(
    diagnostics: Iterable[Diagnostic], files: Sequence[str] = ()
) -> list[Diagnostic]:
    """In reading order: `files` first, then others as they come up, then what has no place."""
    found = list(diagnostics)
    order = {name: index for index, name in reversed(list(enumerate(files)))}
    for diagnostic in found:
        if diagnostic.span is not None:
            order.setdefault(diagnostic.span.file, len(order))
    return sorted(found, key=lambda diagnostic: _place(diagnostic, order))


def summary(diagnostics: Iterable[Diagnostic], name: str) -> str:
    """The last line of a report: `bad.toml: 13 errors, 1 warning`; empty when there is nothing."""
    severities = [diagnostic.severity for diagnostic in diagnostics]
    counts = [(severities.count(word), word) for word in ("error", "warning", "note")]
    parts = [f"{count} {word}{'s' * (count != 1)}" for count, word in counts if count]
    return f"{safe(name)}: {', '.join(parts)}" if parts else ""


def nearest(
    name: str, candidates: Iterable[str], synonyms: Mapping[str, str] | None = None
) -> str | None:
    """The candidate that `name` most likely meant, or None.

    A synonym comes first (`learning_rate -> train.optimizer.lr`; its target need not be a
    candidate), then other case or other hyphens, then the fewest edits (a swap of neighbours is
    one edit), then a candidate that begins with `name` or is its beginning.
    """
    wanted = _folded(name)
    for word, meaning in (synonyms or {}).items():
        if _folded(word) == wanted:
            return meaning
    if not wanted or len(wanted) > WIDEST_TOKEN:
        return None
    names = list(candidates)
    limit = next((edits for length, edits in _LIMITS if len(wanted) <= length), 3)
    ranked = [(_distance(wanted, _folded(item), limit), at) for at, item in enumerate(names)]
    if ranked and min(ranked)[0] <= limit:
        return names[min(ranked)[1]]
    return _by_beginning(wanted, names)


def choices(names: Sequence[str], limit: int = 8) -> str:
    """Names in backticks for a message: "`a`, `b` and 3 more"."""
    listed = ", ".join(f"`{shown(name)}`" for name in names[:limit])
    return listed + (f" and {len(names) - limit} more" if len(names) > limit else "")


def shown(text: str, limit: int = WIDEST_TOKEN) -> str:
    """User's text made fit for a message: one line, nothing invisible, clipped with `...`."""
    clipped = text if len(text) <= limit else text[: limit - 3] + "..."
    return safe(clipped)


def safe(text: str) -> str:
    """Text with control characters, invisible ones and lone surrogates spelled as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_safe_char, text))


def _safe_char(char: str) -> str:
    if char.isprintable() or char == "\u3000" or unicodedata.category(char) == "Zs":
        return char
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char)
    code = ord(char)
    return short or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def _columns(text: str) -> int:
    """Columns that printable text takes in a terminal."""
    return len(text) if text.isascii() else sum(map(_char_columns, text))


def _char_columns(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _wrap(text: str, first: str, rest: str) -> list[str]:
    """Lines of at most 80 columns, broken at spaces; only a word wider than a line is cut."""
    lines, line = [], first
    empty = True
    for word in text.split(" "):
        for piece in _pieces(word, WIDTH - max(_columns(first), _columns(rest))):
            candidate = line + piece if empty else f"{line} {piece}"
            if not empty and _columns(candidate) > WIDTH:
                lines.append(line)
                candidate = rest + piece
            line, empty = candidate, False
    return [*lines, line]


def _pieces(word: str, limit: int) -> list[str]:
    if _columns(word) <= limit:
        return [word]
    pieces = [""]
    for char in word:
        if _columns(pieces[-1]) + _char_columns(char) > limit:
            pieces.append("")
        pieces[-1] += char
    return pieces


def _remark(word: str, text: str, style: Style) -> list[str]:
    indent = " " * (len(word) + 2)
    lines: list[str] = []
    for raw in text.split("\n"):
        lines += _wrap(safe(raw), indent, indent)
    lines[0] = f"{style(word, word + ':')} {lines[0][len(indent) :]}"
    return lines


def _quote(diagnostic: Diagnostic, span: Span, texts: Mapping[str, str], style: Style) -> list[str]:
    width = len(str(span.line))
    place = f"{safe(span.file)}:{span.line}:{span.column}"
    lines = [" " * width + style("gutter", "-->") + " " + style("path", place)]
    line = _line(texts[span.file], span.line) if span.file in texts else diagnostic.excerpt
    if not line:
        return lines
    text, pad, carets = _window(line, span, max(WIDTH - width - 3, MIN_TEXT))
    bar = " " * width + style("gutter", " |")
    lines += [bar, f"{style('gutter', f'{span.line} |')} {text}".rstrip()]
    marks, below = _labelled(diagnostic, pad, carets, max(WIDTH - width - 3, MIN_TEXT), style)
    return [*lines, f"{bar} {marks}", *(f"{bar} {row}" for row in below), bar]


def _labelled(
    diagnostic: Diagnostic, pad: int, carets: int, room: int, style: Style
) -> tuple[str, list[str]]:
    """The carets with their label beside them, or below where it does not fit."""
    label = safe(diagnostic.label)
    marks = " " * pad + style("caret", "^" * carets)
    if not label:
        return marks, []
    if pad + carets + 1 + _columns(label) <= room:
        return f"{marks} {style('label', label)}", []
    indent = " " * max(0, min(pad, room - _columns(label)))
    rows = [row[WIDTH - room :] for row in _wrap(label, " " * (WIDTH - room), " " * (WIDTH - room))]
    return marks, [indent * (len(rows) == 1) + style("label", row) for row in rows]


def _line(text: str, number: int) -> str:
    """Line `number` of a text; only a line feed ends a line in TOML."""
    start = 0
    for _ in range(number - 1):
        start = text.find("\n", start) + 1
        if start == 0:
            return ""
    end = text.find("\n", start)
    return text[start : end if end >= 0 else len(text)].removesuffix("\r")


def _window(line: str, span: Span, room: int) -> tuple[str, int, int]:
    """The piece of a line to show, the columns before the carets, and the number of carets."""
    first = min(span.column - 1, len(line))
    last = span.end_column - 1 if span.end_line == span.line else len(line)
    cells = _cells(line)
    starts = [0]
    for cell in cells:
        starts.append(starts[-1] + _columns(cell))
    begin, end = starts[first], max(starts[min(max(last, first), len(line))], starts[first] + 1)
    if max(starts[-1], end) <= room:
        return "".join(cells), begin, end - begin
    low = 0 if end <= room - 3 else max(0, min(begin - 8, end - room + 11))
    left = next(index for index, at in enumerate(starts) if at >= low)
    dots = "..." if left else ""
    limit = starts[left] + room - len(dots) - (3 if starts[-1] - starts[left] > room - 3 else 0)
    right = max(index for index, at in enumerate(starts) if at <= limit)
    shift = len(dots) - starts[left]
    more = "..." if right < len(cells) else ""
    stop = min(end, max(starts[right], begin + 1))
    return dots + "".join(cells[left:right]) + more, begin + shift, stop - begin


def _cells(line: str) -> list[str]:
    """What each character of a line is shown as; tabs become spaces, the rest is made safe."""
    cells: list[str] = []
    column = 0
    for char in line:
        cells.append(" " * (TAB - column % TAB) if char == "\t" else _safe_char(char))
        column += _columns(cells[-1])
    return cells


def _place(diagnostic: Diagnostic, order: Mapping[str, int]) -> tuple[int, int, int]:
    span = diagnostic.span
    return (len(order), 0, 0) if span is None else (order[span.file], span.line, span.column)


def _folded(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_").strip("_")


def _by_beginning(wanted: str, names: list[str]) -> str | None:
    """The only name that begins with what was typed, or that what was typed begins with."""
    if len(wanted) < 3:
        return None
    longer = [name for name in names if _folded(name).startswith(wanted)]
    shorter = [name for name in names if len(name) > 2 and wanted.startswith(_folded(name) + "_")]
    found = longer or shorter
    return found[0] if len(found) == 1 else None


def _distance(left: str, right: str, limit: int) -> int:
    """Edits from `left` to `right`, a swap of neighbours being one; more than `limit` is any."""
    if abs(len(left) - len(right)) > limit:
        return limit + 1
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, char in enumerate(left, 1):
        older, before, row = before, row, [i]
        for j, other in enumerate(right, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (char != other))
            if i > 1 and j > 1 and char == right[j - 2] and left[i - 2] == other:
                best = min(best, older[j - 2] + 1)
            row.append(best)
    return row[-1]
