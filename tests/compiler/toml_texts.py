"""Recipes' texts as parsed: their faults, and the places of all keys and values."""

import math
import tomllib
from typing import Any

from compiler.diagnostics import Diagnostic, Span
from compiler.source import (
    Source,
    parse_source,
)


def parsed(text: str) -> Source:
    source, diagnostics = parse_source(text, "t.toml")
    assert source is not None, diagnostics
    return source


def faults(text: str) -> list[Diagnostic]:
    source, diagnostics = parse_source(text, "t.toml")
    assert source is None
    assert diagnostics
    return diagnostics


def at(span: Span | None) -> str:
    assert span is not None
    return f"{span.line}:{span.column}-{span.end_line}:{span.end_column}"


def piece(text: str, span: Span) -> str:
    """What a span covers, found independently of `Source.snippet`."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    return text[
        starts[span.line - 1] + span.column - 1 : starts[span.end_line - 1] + span.end_column - 1
    ]


def same(left: Any, right: Any) -> bool:
    """Equal, also for NaN."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return type(left) is type(right) and left == right


def check_all_spans(source: Source) -> None:
    """Each value's span reads as that value; each table and key of the data has a place."""

    def walk(value: Any, path: tuple[str | int, ...]) -> None:
        if path:
            assert source.span(path, "value").file == source.name
            placed = path in source.value_spans or path in source.table_spans
            assert placed or isinstance(value, dict | list)
            assert isinstance(path[-1], int) or path in source.key_spans
        if path in source.value_spans:
            text = piece(source.text, source.value_spans[path])
            assert same(tomllib.loads(f"v = {text}")["v"], value)
            assert text == source.snippet(path)
        if path in source.key_spans and isinstance(path[-1], str):
            text = piece(source.text, source.key_spans[path])
            assert tomllib.loads(f"{text} = 1") == {path[-1]: 1}
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(item, (*path, key))

    walk(source.data, ())
    known = (*source.key_spans, *source.value_spans, *source.table_spans)
    for path in known:
        value: Any = source.data
        for part in path:
            value = value[part]
