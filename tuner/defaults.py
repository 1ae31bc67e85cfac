"""What a key of the recipe is when nobody gives it, told from the recipe's own classes."""

from __future__ import annotations

import re
import types
import typing
from typing import Any, get_args, get_origin

import attrs

from compiler import schema
from compiler.schema import Recipe

_INDEX = re.compile(r"\[\d+\]")


def default_of(key: str) -> str | None:
    """The default of a dotted key as a recipe would spell it; None where there is none.

    A key of a data source that is left open takes `[data]`'s value, so that default counts.
    """
    cls: type | None = Recipe
    default: Any = attrs.NOTHING
    for name in _INDEX.sub("", key).split("."):
        if cls is None:
            return None
        field = _field(cls, name)
        if field is None:
            return None
        default = field.default
        cls = _class_in(typing.get_type_hints(cls)[field.name])
    if default is None and key.startswith("data.source["):
        return default_of("data." + key.split("].", 1)[1])
    return None if default is attrs.NOTHING or default is None else _spelt(default)


def differs(value: str, default: str) -> bool:
    """Whether two spellings mean different values: `1` and `1.0` do not."""
    try:
        return float(value) != float(default)
    except ValueError:
        return value.strip() != default.strip()


def _field(cls: type, name: str) -> attrs.Attribute[Any] | None:
    fields: tuple[attrs.Attribute[Any], ...] = attrs.fields(cls)
    return next((f for f in fields if f.metadata.get("key", f.name) == name), None)


def _class_in(hint: Any) -> type | None:
    """The recipe class that a hint holds, alone, in a union, in a tuple or annotated."""
    if isinstance(hint, type) and attrs.has(hint):
        return hint if hint.__module__.startswith(f"{schema.__name__}.") else None
    if get_origin(hint) in (typing.Union, types.UnionType, tuple, typing.Annotated):
        return next((cls for part in get_args(hint) if (cls := _class_in(part))), None)
    return None


def _spelt(default: Any) -> str:
    value = default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return str(value)
