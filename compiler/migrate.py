"""Old recipes in the present language: one function per version, each a step up.

A migration renames and moves keys. It works on the data and on the places of the keys alike, so
that a message about a migrated key still points at what the person wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import evolve

from compiler.diagnostics import Diagnostic, Span
from compiler.source import Source, dotted
from compiler.spans import KeyPath

SCHEMA = 1
"""The version of the language that this program speaks."""

Renames = Mapping[KeyPath, KeyPath]
"""Old path of a key -> its path one version later."""

MIGRATIONS: Mapping[int, Renames] = {}
"""Version -> what its keys are called in the next one. Version 1 is the first."""


def migrated(
    source: Source, migrations: Mapping[int, Renames] = MIGRATIONS, present: int = SCHEMA
) -> tuple[Source, list[Diagnostic]]:
    """`source` in the language of version `present`; a newer or unknown version is refused."""
    version = source.data.get("schema", present)
    if not isinstance(version, int) or isinstance(version, bool):
        return source, []  # the schema tells the type
    if version > present:
        return source, [_too_new(source, version, present)]
    faults = []
    for step in range(max(version, 1), present):
        for old, new in migrations.get(step, {}).items():
            if _has(source.data, old):
                source = _renamed(source, old, new)
                faults.append(_told(source, old, new, step))
    if version < present and version >= 1:
        source = evolve(source, data={**source.data, "schema": present})
    return source, faults


def _has(data: Mapping[str, Any], path: KeyPath) -> bool:
    node: Any = data
    for part in path:
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _renamed(source: Source, old: KeyPath, new: KeyPath) -> Source:
    data, value = _taken(source.data, old)
    return evolve(
        source,
        data=_put(data, new, value),
        key_spans=_moved(source.key_spans, old, new),
        value_spans=_moved(source.value_spans, old, new),
        table_spans=_moved(source.table_spans, old, new),
    )


def _taken(data: Mapping[Any, Any], path: KeyPath) -> tuple[dict[Any, Any], Any]:
    head, *rest = path
    if not rest:
        return {key: value for key, value in data.items() if key != head}, data[head]
    below, value = _taken(data[head], tuple(rest))
    return {**data, head: below}, value


def _put(data: Mapping[Any, Any], path: KeyPath, value: Any) -> dict[Any, Any]:
    head, *rest = path
    inner = _put(data.get(head, {}), tuple(rest), value) if rest else value
    return {**data, head: inner}


def _moved(spans: Mapping[KeyPath, Span], old: KeyPath, new: KeyPath) -> dict[KeyPath, Span]:
    length = len(old)
    return {(new + p[length:] if p[:length] == old else p): span for p, span in spans.items()}


def _told(source: Source, old: KeyPath, new: KeyPath, version: int) -> Diagnostic:
    return Diagnostic(
        code="old-key",
        severity="warning",
        message=f"`{dotted(old)}` of schema {version} is called `{dotted(new)}` now",
        span=source.span(new, "key"),
        path=dotted(new),
        help="rename it and set `schema` to the present version",
    )


def _too_new(source: Source, version: int, present: int) -> Diagnostic:
    return Diagnostic(
        code="schema-too-new",
        message=f"this recipe is of schema {version}; this tuner speaks up to {present}",
        span=source.span(("schema",)),
        path="schema",
        help="update tuner: pip install --upgrade tuner",
    )
