"""`--set key=value`: one setting of a recipe, given on the command line."""

import re
from collections.abc import Sequence
from typing import Any

from compiler.diagnostics import Diagnostic, shown
from compiler.source import Source, diagnostic_of
from compiler.spans import Extent, KeyPath, Lines, Scan, SpanMap
from compiler.syntax import Fault, Loaded, load

OVERRIDE = "--set"
_OVERRIDE_KEY = re.compile(
    r"""\s*+(?P<key>(?:[A-Za-z0-9_-]+|"[^"\\]*"|'[^']*')(?:\[[0-9]{1,6}\])*"""
    r"""(?:\.(?:[A-Za-z0-9_-]+|"[^"\\]*"|'[^']*')(?:\[[0-9]{1,6}\])*)*)\s*=""",
    re.A,
)
_OVERRIDE_PART = re.compile(r"""\[(?P<index>[0-9]+)\]|"[^"]*"|'[^']*'|[A-Za-z0-9_-]+""", re.A)


def parse_overrides(arguments: Sequence[str]) -> tuple[list[Source], list[Diagnostic]]:
    """All `--set key=value` of a command line; each is one line of the pseudo-file `--set`.

    The value is TOML if it reads as TOML, otherwise a plain string (`model.base=foo/bar`).
    `data.source[0].repeats` and `data.source.0.repeats` reach into an array.
    """
    text = "\n".join(arguments)
    lines = Lines(text)
    sources, diagnostics = [], []
    start = 0
    for argument in arguments:
        found = _override(argument, text, start, lines)
        if isinstance(found, Source):
            sources.append(found)
        else:
            diagnostics.append(diagnostic_of(found, OVERRIDE, text, lines, start))
        start += len(argument) + 1
    return sources, diagnostics


def _override(argument: str, text: str, start: int, lines: Lines) -> Source | Fault:
    """One override, whose text begins at offset `start` of the pseudo-file."""
    match = _OVERRIDE_KEY.match(argument)
    if match is None:
        return _bad_override(argument)
    parts = [(_part(piece), piece.span()) for piece in _OVERRIDE_PART.finditer(match["key"])]
    raw = argument[match.end() :]
    loaded, at = _override_value(raw)
    if isinstance(loaded, Fault):
        extent = (loaded.extent[0] + match.end() - at, loaded.extent[1] + match.end() - at)
        size = max(len(argument), 1)
        extent = (max(0, min(extent[0], size - 1)), min(max(extent[1], 1), size))
        return loaded._replace(extent=extent, first=None)
    keys, values = _override_extents(
        parts, loaded.scan, match.start("key") + start, start + match.end() - at
    )
    data: Any = loaded.data["v"]
    for part, _ in reversed(parts):
        data = {part: data}
    return Source(
        name=OVERRIDE,
        text=text,
        data=data,
        key_spans=SpanMap(keys, lines, OVERRIDE),
        value_spans=SpanMap(values, lines, OVERRIDE),
        kind="override",
    )


def _part(piece: re.Match[str]) -> str | int:
    return (
        int(piece["index"])
        if piece["index"]
        else piece[0].strip(piece[0][0] if piece[0][0] in "\"'" else "")
    )


def _override_value(raw: str) -> tuple[Loaded | Fault, int]:
    """The value of an override, and how many characters stand before it in what was read.

    TOML if it is TOML; else the text itself, unless it looks like TOML gone wrong.
    """
    prefix = "v="
    loaded = load(prefix + raw)
    if not loaded.faults and list(loaded.data) == ["v"]:
        return loaded, len(prefix)
    text = raw.strip()
    limit = next((fault for fault in loaded.faults if fault.code != "invalid-toml"), None)
    if limit is not None:
        return limit, len(prefix)
    if not text:
        message = "this override has no value"
        return Fault((2, 3), message, 'write `""` for an empty string', code="bad-override"), 3
    if text[0] in "\"'[{#" or not text.isprintable():
        fault = loaded.faults[0] if loaded.faults else Fault((2, 3), "this is more than one value")
        return fault._replace(code="bad-override"), len(prefix)
    begin = raw.index(text)
    quoted = load(f"v={' ' * begin}{_quoted(text)}")
    extent = (2 + begin, 2 + begin + len(text))
    quoted.scan.values[("v",)] = extent
    return quoted, len(prefix)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _override_extents(
    parts: Sequence[tuple[str | int, Extent]], found: Scan, key_at: int, value_at: int
) -> tuple[dict[KeyPath, Extent], dict[KeyPath, Extent]]:
    """Extents of an override's keys and values in the pseudo-file."""
    keys: dict[KeyPath, Extent] = {}
    path: KeyPath = ()
    for part, (begin, end) in parts:
        path = (*path, part)
        keys[path] = (begin + key_at, end + key_at)
    for (_, *inner), (begin, end) in found.keys.items():
        if inner:
            keys[(*path, *inner)] = (begin + value_at, end + value_at)
    values: dict[KeyPath, Extent] = {}
    for (_, *inner), (begin, end) in found.values.items():
        values[(*path, *inner)] = (begin + value_at, end + value_at)
    return keys, values


def _bad_override(argument: str) -> Fault:
    size = max(1, len(argument.split("\n")[0]))
    if "=" not in argument:
        advice = f"write `--set {shown(argument.strip()) or 'key'}=value`"
        return Fault((0, size), "an override needs `=` and a value", advice, code="bad-override")
    key = argument.partition("=")[0]
    if not key.strip():
        return Fault((0, 1), "there is no key before `=`", code="bad-override")
    advice = "write keys as in `--set train.optimizer.lr=1e-4`"
    extent = (0, max(1, len(key.split("\n")[0])))
    return Fault(extent, f"`{shown(key.strip())}` is not a key", advice, code="bad-override")
