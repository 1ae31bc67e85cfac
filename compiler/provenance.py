"""Where every value of a plan came from: what no pass decided is noted here, for all keys alike.

A pass decides what the recipe leaves open or what needs saying. Everything else is what the
recipe, a preset or an override states, or the default of the schema's class; one walk over the
classes tells which, so that `tuner plan --explain KEY` has an answer for each key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from attrs import evolve

from compiler.draft import Draft, spelt
from compiler.kinds import fields_of, leaf_of, tables_in
from compiler.mended import below
from compiler.plan import Decision
from compiler.source import dotted
from compiler.spans import KeyPath

INHERITED = "inherited"
AS = "as "
LEFT_OUT = "left out"
UNUSED = "not used"
SOURCES: KeyPath = ("data", "source")


def completed(draft: Draft) -> tuple[Decision, ...]:
    """The draft's decisions and one for each further key of its recipe, in the schema's order."""
    decided: dict[str, list[Decision]] = {}
    for decision in draft.decisions:
        decided.setdefault(decision.key, []).append(decision)
    found: list[Decision] = []
    for path, value in _leaves(draft.recipe, ()):
        key = dotted(path)
        found += decided.pop(key, []) or [_undecided(draft, path, value)]
    found += [decision for rest in decided.values() for decision in rest]
    values = {decision.key: decision.value for decision in found}
    return tuple(_taken_over(decision, values) for decision in found)


def _taken_over(decision: Decision, values: Mapping[str, str]) -> Decision:
    """An inherited decision with the value of `[data]`, if that has such a key at all."""
    if decision.source != INHERITED:
        return decision
    above = decision.why.removeprefix(AS)
    if above in values:
        return evolve(decision, value=values[above])
    return evolve(decision, value=LEFT_OUT, source="default", why="")


def known(draft: Draft) -> tuple[Decision, ...]:
    """What holds although the recipe has errors: neither what is blamed, nor what was left open
    because a pass that needed it never ran."""
    blamed = {fault.path for fault in draft.diagnostics if fault.severity == "error"}
    return tuple(
        decision
        for decision in completed(draft)
        if decision.value != UNUSED and not any(below(decision.key, path) for path in blamed)
    )


def _leaves(table: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Each key of a table that is no table itself, with its value; an absent table is one too."""
    cls: type = type(table)
    for field in fields_of(cls):
        value, here = getattr(table, field.name), (*path, field.key)
        if attrs.has(type(value)) and leaf_of(type(value)) is None:
            yield from _leaves(value, here)
        elif isinstance(value, tuple) and value and attrs.has(type(value[0])):
            for number, entry in enumerate(value):
                yield from _leaves(entry, (*here, number))
        elif isinstance(value, dict) and value:
            yield from _entries(value, here)
        elif value is None and path[:1] == SOURCES[:1]:
            inner = [one.key for table in tables_in(field.type) for one in fields_of(table)]
            yield from (((*here, key), None) for key in inner) if inner else ((here, None),)
        else:
            yield here, value


def _entries(table: dict[Any, Any], path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """The entries of a table whose keys are the user's own, and of tables in it."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _entries(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _undecided(draft: Draft, path: KeyPath, value: Any) -> Decision:
    """A key that no pass spoke of: as somebody wrote it, inherited, or the default."""
    key = dotted(path)
    given = draft.given(path)
    source = draft.located.where(path) if given else "default"
    if value == "auto":
        return Decision(key=key, value=UNUSED, source=source, why="nothing here depends on it")
    if given:
        return Decision(key=key, value=spelt(value), source=source, why="")
    if path[:2] == SOURCES and (value is None or len(path) > len(SOURCES) + 2):
        above = dotted(("data", *path[3:]))
        return Decision(key=key, value="", source=INHERITED, why=f"{AS}{above}")
    left_out = value is None
    return Decision(key=key, value=LEFT_OUT if left_out else spelt(value), source=source, why="")
