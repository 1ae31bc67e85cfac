"""TOML text to data, with the place of every key and value; layers of it as one.

`tomllib` is the judge of the data; `compiler.spans` finds the places, `compiler.syntax` words
the faults. All a user can do wrong here becomes a Diagnostic; nothing raises.
"""

import functools
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import attrs

from compiler.diagnostics import Diagnostic, Span, nearest, shown
from compiler.spans import KeyPath, Lines, SpanMap
from compiler.syntax import Fault, load

Part = Literal["key", "value", "table"]
Kind = Literal["recipe", "preset", "override"]
MAX_BYTES = 8 * 2**20
_BOMS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


class TableRule(NamedTuple):
    """How layers of a table join; `structure.tagged_paths` makes these."""

    tag: str = ""
    """Key that tells the kinds of this table apart."""
    shorthand: str = ""
    """Key that a plain value in place of the table stands for."""


@attrs.frozen(kw_only=True, eq=False)
class Source:
    """One TOML text: its data, and where each key and value stands."""

    name: str
    """As shown to the user: a path, `preset:NAME`, or `--set`."""
    text: str
    """Without byte order mark, lines ending in a line feed."""
    data: dict[str, Any]
    key_spans: Mapping[KeyPath, Span]
    value_spans: Mapping[KeyPath, Span]
    table_spans: Mapping[KeyPath, Span] = attrs.field(factory=dict)
    """Headers: `[adapter]`, `[[data.source]]`."""
    kind: Kind = "recipe"

    @property
    def texts(self) -> dict[str, str]:
        """Texts by file name, for `render`."""
        return {self.name: self.text}

    def span(self, path: KeyPath, of: Part = "value") -> Span:
        """Where the key, value or table at `path` stands; else its nearest parent."""
        keys, values, tables = self.key_spans, self.value_spans, self.table_spans
        orders = {
            "key": (keys, tables, values),
            "value": (values, tables, keys),
            "table": (tables, values, keys),
        }
        found = _first(orders[of], path)
        for length in range(len(path) - 1, 0, -1):
            found = found or _first(orders["table" if of == "table" else "value"], path[:length])
        return found or Span(file=self.name, line=1, column=1, end_line=1, end_column=1)

    def snippet(self, path: KeyPath) -> str:
        """The user's own text of the value at `path`; empty where there is none."""
        span = self.value_spans.get(path)
        if span is None:
            return ""
        starts = self._lines.starts
        begin = starts[span.line - 1] + span.column - 1
        return self.text[begin : starts[span.end_line - 1] + span.end_column - 1]

    @functools.cached_property
    def _lines(self) -> Lines:
        return Lines(self.text)

    def origin(self, path: KeyPath) -> "Source":
        """The source that gave the value at `path`."""
        return self

    def locate(self, path: KeyPath) -> tuple["Source", KeyPath]:
        """The source that gave the value at `path`, and its path there."""
        return self, path

    def where(self, path: KeyPath) -> str:
        """`recipe.toml:12`, `preset:NAME:3`, or `--set`."""
        return self.name if self.kind == "override" else f"{self.name}:{self.span(path).line}"


@attrs.frozen(kw_only=True, eq=False)
class Merged:
    """Several sources laid over each other; the same questions as to a Source."""

    data: dict[str, Any]
    sources: tuple[Source, ...]
    """Weakest first."""
    origins: Mapping[KeyPath, tuple[Source, KeyPath]]
    """For each table and leaf: the source that gave it, and its path there."""

    @property
    def texts(self) -> dict[str, str]:
        """Texts by file name, for `render`."""
        return {source.name: source.text for source in self.sources}

    def span(self, path: KeyPath, of: Part = "value") -> Span:
        """Where the key, value or table at `path` stands, in the source that gave it."""
        source, own = self.locate(path)
        return source.span(own, of)

    def snippet(self, path: KeyPath) -> str:
        """The user's own text of the value at `path`; empty where there is none."""
        source, own = self.locate(path)
        return source.snippet(own)

    def origin(self, path: KeyPath) -> Source:
        """The source that gave the value at `path`; of a key not given, its table's."""
        return self.locate(path)[0]

    def where(self, path: KeyPath) -> str:
        """`recipe.toml:12`, `preset:NAME:3`, or `--set`."""
        source, own = self.locate(path)
        return source.where(own)

    def locate(self, path: KeyPath) -> tuple[Source, KeyPath]:
        """The source that gave the value at `path` or its nearest parent, and its path there."""
        for length in range(len(path), -1, -1):
            found = self.origins.get(path[:length])
            if found is not None:
                return found[0], found[1] + path[length:]
        raise AssertionError("the root has an origin")


def read_source(
    path: Path, shown_as: str, kind: Kind = "recipe"
) -> tuple[Source | None, list[Diagnostic]]:
    """The TOML file at `path`, named `shown_as` in messages; None and diagnostics if it is bad."""
    content = _read(path, shown_as)
    if isinstance(content, Diagnostic):
        return None, [content]
    text = _decode(content, shown_as)
    if isinstance(text, Diagnostic):
        return None, [text]
    return parse_source(text, shown_as, kind)


def parse_source(
    text: str, shown_as: str, kind: Kind = "recipe"
) -> tuple[Source | None, list[Diagnostic]]:
    """TOML text, named `shown_as` in messages; None and diagnostics if it is bad.

    The diagnostics carry their source line, since without a Source there is no text to quote.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    loaded = load(text)
    lines = Lines(text)
    if loaded.faults:
        return None, [diagnostic_of(fault, shown_as, text, lines, 0) for fault in loaded.faults]
    found = loaded.scan
    source = Source(
        name=shown_as,
        text=text,
        data=loaded.data,
        key_spans=SpanMap(found.keys, lines, shown_as),
        value_spans=SpanMap(found.values, lines, shown_as),
        table_spans=SpanMap(found.tables, lines, shown_as),
        kind=kind,
    )
    return source, []


def merge(
    layers: Sequence[Source], rules: Mapping[tuple[str, ...], TableRule] | None = None
) -> tuple[Merged, list[Diagnostic]]:
    """Layers from weakest (a preset) to strongest (an override), as one.

    Tables merge key by key, anything else is replaced, arrays as a whole; an override may reach
    into an array's entry, and one that is an empty table over another table is refused. With
    `rules` (see `structure.tagged_paths`) a shorthand below opens: `optimizer = "adamw"` and a
    later `optimizer.lr` join. And a file that changes a tag (another `kind`) replaces the whole
    table, since the settings of one kind mean nothing to another; an override changes just the key.
    """
    assert layers, "there is at least a recipe"
    stack = _Stack(rules or {})
    for layer in layers:
        if layer.kind != "override" or () not in stack.origins:
            stack.origins[()] = (layer, ())
        stack.lay(stack.data, layer.data, (), (), layer)
    merged = Merged(data=stack.data, sources=tuple(layers), origins=stack.origins)
    return merged, stack.diagnostics


def dotted(path: KeyPath) -> str:
    """A path as in messages: `data.source[1].repeats`."""
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return out


class _Stack:
    """What has been laid so far; only `merge` makes one."""

    def __init__(self, rules: Mapping[tuple[str, ...], TableRule]) -> None:
        self.rules = rules
        self.data: dict[str, Any] = {}
        self.origins: dict[KeyPath, tuple[Source, KeyPath]] = {}
        self.diagnostics: list[Diagnostic] = []

    def lay(
        self,
        base: dict[str, Any],
        over: Mapping[Any, Any],
        path: KeyPath,
        own: KeyPath,
        layer: Source,
    ) -> None:
        """Lay a table over the one at `path`; `own` is its path within its layer."""
        for key, value in over.items():
            here, there = (*path, key), (*own, key)
            self.open_shorthand(base, key, value, here)
            old = base.get(key)
            if layer.kind == "override" and isinstance(old, list) and isinstance(value, dict):
                self.reach(old, value, here, there, layer)
            elif index := _index_in(value):
                message = f"`{shown(dotted(here))}` is not an array"
                self.complain(layer, (*there, *index), message)
            elif layer.kind == "override" and value == {} and isinstance(old, dict) and old:
                self.empty(layer, here, there)
            elif isinstance(value, dict) and self.joins(old, value, here, layer):
                if layer.kind != "override" or here not in self.origins:
                    self.origins[here] = (layer, there)
                self.lay(base.setdefault(key, {}), value, here, there, layer)
            else:
                base[key] = self.put(value, here, there, layer)

    def empty(self, layer: Source, here: KeyPath, own: KeyPath) -> None:
        """Note an override that lays nothing over a table."""
        name = shown(dotted(here))
        self.diagnostics.append(
            Diagnostic(
                code="no-effect",
                message=f"an empty table changes nothing in `{name}`: tables are joined key by key",
                help=f"set one of its keys, `{name}.KEY=...`; to leave the table out, take it out "
                "of the recipe",
                span=layer.span(own, "key"),
                path=dotted(here),
            )
        )

    def joins(self, old: Any, value: dict[str, Any], here: KeyPath, layer: Source) -> bool:
        """Whether a table is laid into the one below instead of replacing it."""
        if old is None:
            return True
        if not isinstance(old, dict):
            return False
        tag = self.rule(here).tag
        same = tag not in value or old.get(tag, value[tag]) == value[tag]
        if same or layer.kind == "override":
            return True
        self.forget(here)
        old.clear()
        return True

    def open_shorthand(self, base: dict[str, Any], key: str, value: Any, here: KeyPath) -> None:
        """Make a plain value below a table into the table it stands for."""
        short = self.rule(here).shorthand
        if short and isinstance(value, dict) and type(base.get(key)) in (str, int, float, bool):
            base[key] = {short: base[key]}
            self.origins[(*here, short)] = self.origins[here]

    def rule(self, here: KeyPath) -> TableRule:
        """The rule of the table at a path."""
        pattern = tuple("*" if isinstance(part, int) else part for part in here)
        return self.rules.get(pattern, TableRule())

    def reach(
        self,
        entries: list[Any],
        over: Mapping[Any, Any],
        path: KeyPath,
        own: KeyPath,
        layer: Source,
    ) -> None:
        """Lay an override into entries of an array."""
        for key, value in over.items():
            there = (*own, key)
            index = int(key) if str(key).isdecimal() and str(key).isascii() else -1
            if not 0 <= index < len(entries):
                message = f"`{shown(dotted(path))}` has no entry `{shown(str(key))}`"
                advice = _entries(len(entries))
                if str(key).isidentifier() and entries:
                    advice += f": write `{shown(dotted(path))}[0].{shown(str(key))}`"
                self.complain(layer, there, message, advice)
            elif value == {} and isinstance(entries[index], dict) and entries[index]:
                self.empty(layer, (*path, index), there)
            elif isinstance(value, dict) and isinstance(entries[index], dict):
                self.lay(entries[index], value, (*path, index), there, layer)
            else:
                entries[index] = self.put(value, (*path, index), there, layer)

    def put(self, value: Any, here: KeyPath, there: KeyPath, layer: Source) -> Any:
        """A copy of a value, its origin noted for it and all within."""
        self.forget(here)
        self.origins[here] = (layer, there)
        if isinstance(value, dict):
            items = value.items()
            return {key: self.put(item, (*here, key), (*there, key), layer) for key, item in items}
        if isinstance(value, list):
            pairs = enumerate(value)
            return [self.put(item, (*here, at), (*there, at), layer) for at, item in pairs]
        return value

    def forget(self, here: KeyPath) -> None:
        """Drop the origins below a path that is replaced."""
        if here in self.origins:
            size = len(here)
            stale = [path for path in self.origins if len(path) > size and path[:size] == here]
            for path in stale:
                del self.origins[path]

    def complain(self, layer: Source, own: KeyPath, message: str, advice: str = "") -> None:
        """Note an override that reaches for nothing."""
        self.diagnostics.append(
            Diagnostic(
                code="no-such-entry",
                message=message,
                help=advice,
                span=layer.span(own, "key"),
                path=dotted(own),
            )
        )


def _index_in(value: Any) -> tuple[int, ...]:
    """The index an override uses on a value, which is then no table of its own."""
    keys = value if isinstance(value, dict) else ()
    return tuple(key for key in keys if isinstance(key, int))


def _entries(count: int) -> str:
    if count == 0:
        return "the array is empty"
    return "its only entry is 0" if count == 1 else f"its entries are 0 to {count - 1}"


def _first(tables: Iterable[Mapping[KeyPath, Span]], path: KeyPath) -> Span | None:
    return next((table[path] for table in tables if path in table), None)


def _line_at(text: str, start: int) -> str:
    end = text.find("\n", start)
    return text[start : end if end >= 0 else len(text)]


def diagnostic_of(fault: Fault, name: str, text: str, lines: Lines, shift: int) -> Diagnostic:
    """A fault in `text`, named `name` in messages; its extents begin at offset `shift` there."""
    span = lines.span(name, (fault.extent[0] + shift, fault.extent[1] + shift))
    notes: tuple[str, ...] = ()
    if fault.first is not None:
        line, column = lines.place(fault.first[0] + shift)
        notes = (f"first given at {shown(name, 60)}:{line}:{column}",)
    return Diagnostic(
        code=fault.code,
        message=fault.message,
        span=span,
        label=fault.label,
        help=fault.help,
        notes=notes,
        excerpt=_line_at(text, lines.starts[span.line - 1]),
    )


def _read(path: Path, name: str) -> bytes | Diagnostic:
    """The bytes of a regular file that is not absurdly large."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return _unreadable(name, "is a folder, not a recipe", "not-a-file", _recipes_in(path))
        if not stat.S_ISREG(status.st_mode):
            return _unreadable(name, "is not a regular file", "not-a-file")
        if status.st_size > MAX_BYTES:
            return _too_large(name)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return _unreadable(name, "does not exist", "no-such-file", _sibling(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its name is not valid"
        return _unreadable(name, f"cannot be read: {reason.lower()}", "unreadable-file")
    return content if len(content) <= MAX_BYTES else _too_large(name)


def _too_large(name: str) -> Diagnostic:
    return _unreadable(name, f"is larger than {MAX_BYTES >> 20} MiB", "file-too-large")


def _unreadable(name: str, what: str, code: str, advice: str = "") -> Diagnostic:
    return Diagnostic(code=code, message=f"`{shown(name, 300)}` {what}", help=advice)


def _sibling(path: Path) -> str:
    """A file beside a missing one that was probably meant."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix == ".toml"]
    except (OSError, ValueError):
        return ""
    near = nearest(path.name, sorted(names))
    return f"did you mean `{shown(str(path.parent / near), 300)}`?" if near else ""


def _recipes_in(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".toml")
    except OSError:
        return ""
    return f"did you mean `{shown(str(path / names[0]), 300)}`?" if names else ""


def _decode(content: bytes, name: str) -> str | Diagnostic:
    for mark, encoding in _BOMS:
        if content.startswith(mark):
            return _not_utf8(name, encoding)
    if content.count(b"\x00", 0, 400) * 3 > len(content[:400]):
        return _not_utf8(name, "UTF-16")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _bad_byte(content, error.start, name)
    at = text.find("\x00")
    if at >= 0:
        fault = Fault((at, at + 1), "this file holds a NUL byte", code="wrong-encoding")
        return diagnostic_of(fault, name, text, Lines(text), 0)
    conflict = re.search(r"^<{7}(?= |$)", text, re.M)
    if conflict is not None:
        what = "a merge was left undone here: both versions stand in the file"
        fault = Fault(conflict.span(), what, "keep one of the two, and take the marks out")
        return diagnostic_of(fault, name, text, Lines(text), 0)
    if "\n" not in text and text.rstrip().count("\r"):
        at = text.index("\r")
        what = "its lines end with carriage returns alone, which TOML does not know"
        advice = "save it with line ends of Unix (LF) or Windows (CRLF)"
        fault = Fault((at, at + 1), what, advice, code="wrong-encoding")
        return diagnostic_of(fault, name, text, Lines(text), 0)
    return text


def _not_utf8(name: str, encoding: str) -> Diagnostic:
    message = f"`{shown(name, 300)}` is {encoding}, but a recipe must be UTF-8"
    advice = "save it as UTF-8 in your editor"
    return Diagnostic(code="wrong-encoding", message=message, help=advice)


def _bad_byte(content: bytes, at: int, name: str) -> Diagnostic:
    start = content.rfind(b"\n", 0, at) + 1
    end = content.find(b"\n", at)
    line = content[start : end if end >= 0 else len(content)]
    before = line[: at - start].decode("utf-8", "replace").removeprefix("\ufeff")
    number, column = content.count(b"\n", 0, at) + 1, len(before) + 1
    return Diagnostic(
        code="wrong-encoding",
        message=f"byte 0x{content[at]:02x} is not UTF-8",
        span=Span(file=name, line=number, column=column, end_line=number, end_column=column + 1),
        help="save the file as UTF-8 (it may be Latin-1 or Windows-1252)",
        excerpt=before + line[at - start :].decode("utf-8", "replace").rstrip("\r"),
    )
