"""What the types of a recipe's fields mean: which TOML values they take, and how to say so."""

import enum
import functools
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import attrs

from compiler.diagnostics import choices
from compiler.source import TableRule

SCALARS = ("bool", "int", "float", "str")
LEAVES: dict[type, "Leaf"] = {}
"""Foreign types taught by `structure.register_leaf`."""
_TAGS = ("kind", "name")
_KINDS: dict[type, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    dict: "table",
    list: "array",
}
_PLAIN: dict[Any, tuple[str, ...]] = {
    bool: ("bool",),
    int: ("int",),
    float: ("int", "float"),
    str: ("str",),
    Any: tuple(_KINDS.values()),
}
_WORDS: dict[Any, str] = {
    bool: "`true` or `false`",
    int: "a whole number",
    float: "a number",
    str: "a string",
}


@attrs.frozen(kw_only=True)
class Range:
    """Bounds of a number, for `Annotated[int, Range(ge=1)]`.

    NaN and infinity are refused unless `nonfinite` is set.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    nonfinite: bool = False


@attrs.frozen(kw_only=True)
class Length:
    """Bounds of the number of entries of an array or table, or of characters of a string."""

    ge: int = 0
    le: int | None = None


class Leaf(NamedTuple):
    """A type that is written as one string or number."""

    parse: Callable[[Any], Any]
    expects: str
    code: str = "bad-unit"
    examples: tuple[str, ...] = ()


class Field(NamedTuple):
    """One key of a table, as its class declares it."""

    name: str
    """Of the attribute."""
    key: str
    """In the file."""
    type: Any
    required: bool
    default: Any
    """`attrs.NOTHING` where there is none; factories are called."""
    metadata: Mapping[str, Any]


def leaf_of(kind: Any) -> Leaf | None:
    """The leaf a type is, if it is one."""
    if not isinstance(kind, type):
        return None
    if kind in LEAVES:
        return LEAVES[kind]
    parse, expects = getattr(kind, "parse", None), getattr(kind, "expects", None)
    if parse is None or not isinstance(expects, str):
        return None
    code, examples = getattr(kind, "code", "bad-unit"), getattr(kind, "examples", ())
    return Leaf(parse, expects, code if isinstance(code, str) else "bad-unit", examples)


def origin_of(kind: Any) -> Any:
    """`typing.get_origin`, whose own type is too narrow to compare with."""
    return typing.get_origin(kind)


@functools.cache
def fields_of(cls: type) -> tuple[Field, ...]:
    """The keys of a table, in the order of its class."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields: tuple[attrs.Attribute[Any], ...] = attrs.fields(cls)
    return tuple(_field(item, hints[item.name]) for item in fields if item.init)


def is_union(kind: Any) -> bool:
    """Whether a type is `X | Y`, however spelled."""
    return origin_of(kind) in (typing.Union, types.UnionType)


def members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, without None; TOML has no null, so None is only "left out"."""
    flat: list[Any] = []
    for item in typing.get_args(kind):
        flat += members(item) if is_union(item) else [item]
    return tuple(item for item in flat if item is not types.NoneType)


def tag_of(classes: Sequence[type]) -> str | None:
    """The key that tells the classes of a union apart."""
    for tag in _TAGS:
        values = [tag_values(cls, tag) for cls in classes]
        flat = [value for some in values for value in some]
        if all(values) and len(set(flat)) == len(flat):
            return tag
    return None


def kind_of(value: Any) -> str:
    """The TOML type of a value: bool, int, float, str, table, array or date."""
    return _KINDS.get(type(value), "date")


def type_words(kind: Any) -> str:
    """What a type expects, in words for a message: "a whole number", "one of `a`, `b`"."""
    origin = origin_of(kind)
    if origin is Annotated:
        return type_words(typing.get_args(kind)[0])
    if is_union(kind):
        return _union_words(members(kind))
    if origin is Literal:
        return literal_words(typing.get_args(kind))
    leaf = leaf_of(kind)
    if leaf is not None:
        return leaf.expects
    if origin in (tuple, list, frozenset):
        return "an array"
    if origin is dict or attrs.has(kind):
        return "a table"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return literal_words(tuple(item.value for item in kind))
    return _WORDS.get(kind, "a value")


def shapes_of(kind: Any) -> frozenset[str]:
    """The TOML types that a type takes."""
    origin = origin_of(kind)
    if origin is Annotated:
        return shapes_of(typing.get_args(kind)[0])
    if is_union(kind):
        return frozenset().union(*(shapes_of(item) for item in members(kind)))
    if origin is Literal:
        return frozenset(kind_of(item) for item in typing.get_args(kind))
    if leaf_of(kind) is not None:
        return frozenset(("str", "int", "float"))
    if origin in (tuple, list, frozenset):
        return frozenset(("array",))
    if origin is dict:
        return frozenset(("table",))
    if attrs.has(kind):
        return _table_shapes(kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return frozenset(kind_of(item.value) for item in kind)
    return frozenset(_PLAIN.get(kind, ()))


def takes_text(kind: Any) -> bool:
    """Whether a type takes any string."""
    if origin_of(kind) is Annotated:
        return takes_text(typing.get_args(kind)[0])
    return kind is str or (is_union(kind) and any(map(takes_text, members(kind))))


def _table_shapes(cls: type) -> frozenset[str]:
    short = getattr(cls, "__shorthand__", None)
    field = next((one for one in fields_of(cls) if one.key == short), None)
    shapes = frozenset(("table",))
    return shapes if field is None else shapes | (shapes_of(field.type) & frozenset(SCALARS))


def only_shape(kind: Any) -> str:
    """The only TOML type a type takes, or nothing when there are several."""
    shapes = shapes_of(kind)
    return next(iter(shapes)) if len(shapes) == 1 else ""


def tables_in(kind: Any) -> Iterator[type]:
    """The tables that may stand at a field, directly or in an array."""
    if leaf_of(kind) is not None:
        return
    if isinstance(kind, type) and attrs.has(kind):  # the limits of an `Annotated` are instances
        yield kind
        return
    for item in typing.get_args(kind) if origin_of(kind) is not Literal else ():
        yield from tables_in(item)


def tag_values(cls: type, tag: str) -> tuple[Any, ...]:
    """The values of a class's tag; nothing where it has no such tag."""
    for field in fields_of(cls):
        if field.key == tag and origin_of(field.type) is Literal:
            return typing.get_args(field.type)
    return ()


def has_key(classes: Sequence[type], key: str) -> bool:
    """Whether any of the tables has a key."""
    return any(field.key == key for cls in classes for field in fields_of(cls))


@functools.cache
def places(cls: type) -> dict[str, tuple[str, ...]]:
    """Where in a recipe each key may stand, by the key (or a synonym of it) alone."""
    found: dict[str, tuple[str, ...]] = {}
    for path, synonyms in _all_keys(cls, ()):
        for name in (path[-1], *synonyms):
            found[name] = (*found.get(name, ()), ".".join(path))
    return {key: tuple(dict.fromkeys(paths)) for key, paths in found.items()}


def tables(cls: type) -> frozenset[str]:
    """The tables that stand in no other one."""
    return frozenset(path[0] for path, _ in _all_keys(cls, ()) if len(path) > 1)


def _all_keys(
    cls: type, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    for field in fields_of(cls):
        here = (*path, field.key)
        yield here, tuple(field.metadata.get("synonyms", ()))
        for inner in tables_in(field.type):
            yield from _all_keys(inner, here)


def tagged_paths(cls: type) -> dict[tuple[str, ...], TableRule]:
    """For `merge`: the tables that are told apart by a tag, or that a plain value may stand for.

    Entries of an array are `*` in a path.
    """
    return dict(_rules(cls, ()))


def _rules(cls: type, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], TableRule]]:
    for field in fields_of(cls):
        yield from _rules_of(field.type, (*path, field.key))


def _rules_of(kind: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], TableRule]]:
    origin = origin_of(kind)
    if origin in (tuple, list, frozenset):
        for item in typing.get_args(kind):
            yield from _rules_of(item, (*path, "*")) if item is not ... else ()
        return
    options = members(kind) if is_union(kind) else (kind,)
    classes = [item for item in options if attrs.has(item) and leaf_of(item) is None]
    tag = tag_of(classes) if len(classes) > 1 else None
    short = next((cls.__shorthand__ for cls in classes if hasattr(cls, "__shorthand__")), "")
    if tag or short:
        yield path, TableRule(tag=tag or "", shorthand=short)
    for item in options:
        if item in classes:
            yield from _rules(item, path)
        elif is_union(kind):
            yield from _rules_of(item, path)


def _field(item: "attrs.Attribute[Any]", kind: Any) -> Field:
    default: Any = item.default
    if hasattr(default, "factory"):
        default = None if default.takes_self else default.factory()
    required = item.default is attrs.NOTHING
    key = str(item.metadata.get("key", item.name))
    return Field(item.name, key, kind, required, default, item.metadata)


def _union_words(options: Sequence[Any]) -> str:
    literals = [
        item for one in options if origin_of(one) is Literal for item in typing.get_args(one)
    ]
    words = [type_words(one) for one in options if origin_of(one) is not Literal]
    words = list(dict.fromkeys(words))
    if literals and any("," in word for word in words):  # an enumeration of its own
        return f"{' or '.join(words)}; or {literal_words(literals)}"
    words += [f"`{_spelled(item)}`" for item in literals]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def literal_words(values: Sequence[Any], limit: int = 12) -> str:
    """Values to choose from, in words."""
    names = [_spelled(value) for value in values]
    return f"`{names[0]}`" if len(names) == 1 else f"one of {choices(names, limit)}"


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
