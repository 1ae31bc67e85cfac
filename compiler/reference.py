"""Every key of the recipe as one row of facts, from the schema classes: for people and programs.

Nothing here is imported by `plan` or `run`, since reading the classes' documentation costs.
"""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import attrs
from attrs import frozen

from compiler.jsonschema import field_docs
from compiler.kinds import (
    Field,
    Range,
    fields_of,
    is_union,
    leaf_of,
    members,
    origin_of,
    tables_in,
    type_words,
)
from compiler.schema import Recipe

_INDEX = re.compile(r"\[\d+\]")


@frozen(kw_only=True)
class Row:
    """One key. A table is a row too; `fields` are then the keys in it."""

    key: str  # dotted; entries of an array are `[]`: data.source[].path
    words: str  # what it takes: "a whole number or `auto`"
    range: str  # ">= 1"; "" where any value of its type will do
    default: str  # as a recipe spells it; "" where there is none
    required: bool
    unit: str
    doc: str
    table: bool
    fields: tuple[Row, ...] = ()


@functools.cache
def rows(cls: type = Recipe) -> tuple[Row, ...]:
    """The keys of the recipe's top level, in its order, with all that lies below."""
    return tuple(_row(cls, field, "") for field in fields_of(cls))


def all_rows() -> Iterator[Row]:
    """Every key of the recipe, tables before what is in them."""

    def below(some: tuple[Row, ...]) -> Iterator[Row]:
        for row in some:
            yield row
            yield from below(row.fields)

    return below(rows())


def row_of(key: str) -> Row | None:
    """The row of a dotted key, whichever entry of an array it names.

    A key of the user's own in a free table (`validation.prompts.beach`) has its table's row.
    """
    wanted = _INDEX.sub("[]", key)
    found = {row.key: row for row in all_rows()}
    for name in (wanted, f"{wanted}[]", wanted.removesuffix("[]")):
        if name in found:
            return found[name]
    free = found.get(wanted.rpartition(".")[0])
    return free if free is not None and not free.fields else None


def _row(cls: type, field: Field, above: str) -> Row:
    key = f"{above}.{field.key}" if above else field.key
    tables = list(tables_in(field.type))
    array = bool(tables) and origin_of(_bare(field.type)) in (tuple, list)
    inside = f"{key}[]" if array else key
    return Row(
        key=inside if tables else key,
        words="one table for each entry" if array else type_words(field.type),
        range=_range(field.type),
        default=_default(field),
        required=field.required,
        unit=str(field.metadata.get("unit", "")),
        doc=" ".join(field_docs(cls).get(field.name, "").split()),
        table=bool(tables),
        fields=tuple(_row(table, one, inside) for table in tables for one in fields_of(table)),
    )


def _bare(kind: Any) -> Any:
    """A type without `Annotated` and without the None of a key that may be left out."""
    if origin_of(kind) is Annotated:
        return _bare(typing.get_args(kind)[0])
    options = members(kind) if is_union(kind) else (kind,)
    return options[0] if len(options) == 1 and is_union(kind) else kind


def _range(kind: Any) -> str:
    """The bounds of the numbers of a type: ">= 1", "0 to 1"."""
    if origin_of(kind) is Annotated:
        limits = [limit for limit in typing.get_args(kind)[1:] if isinstance(limit, Range)]
        return " and ".join(map(_bounds, limits))
    if is_union(kind):
        return next(filter(None, map(_range, members(kind))), "")
    return ""


def _bounds(limit: Range) -> str:
    if limit.ge is not None and limit.le is not None:
        both = f"{limit.ge:g} to {limit.le:g}"
        return f"{limit.ge:g}" if limit.ge == limit.le else both
    signs = ((">=", limit.ge), (">", limit.gt), ("<=", limit.le), ("<", limit.lt))
    return " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)


def _default(field: Field) -> str:
    value = field.default
    if value is attrs.NOTHING or value is None:
        return ""
    return "" if attrs.has(type(value)) and leaf_of(type(value)) is None else spelt(value)


def spelt(value: Any) -> str:
    """A value as a recipe spells it: texts in quotes, lists in brackets."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list | frozenset):
        return f"[{', '.join(map(spelt, value))}]"
    if isinstance(value, dict):
        inside = ", ".join(f"{key} = {spelt(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    return str(value) if isinstance(value, int) else f'"{value}"'
