"""TOML data to attrs objects: every fault at once, each with its place and a useful sentence.

How a class of the recipe is declared:

    @attrs.frozen(kw_only=True)
    class Lora:
        kind: Literal["lora"] = "lora"              # the tag of a union: named `kind` or `name`
        rank: Annotated[int, Range(ge=1, le=4096)] = 16
        every: Interval = Interval.parse("1 epoch")  # a leaf: has `parse` and `expects`
        alpha: float | Literal["auto"] = "auto"
        ids: Annotated[tuple[str, ...], Length(ge=1)] = ()
        lr: float = attrs.field(metadata={"synonyms": ("learning_rate",), "key": "lr", "unit": ""})

A field without default is a required key. `X | None = None` is a key that may be left out.
`Lora | Dora` is told apart by the tag. `__shorthand__: ClassVar[str] = "name"` in a class lets a
plain value stand for a table with only that key (`optimizer = "adamw"`). `metadata["key"]` is the
key in the file where Python cannot spell it (`from`).

cattrs picks the hook for a type; all hooks are ours, since its own convert silently (`"false"` to
`True`) and name no place.
"""

import enum
import functools
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import attrs
import cattrs

from compiler.diagnostics import Diagnostic, nearest
from compiler.faults import (
    INT64,
    Fault,
    Rejected,
    check_length,
    check_range,
    count,
    escaped,
    key_faults,
    no_choice,
    no_option,
    placed_elsewhere,
    reject,
    to_diagnostics,
    unknown_key,
    without_echoes,
    wrong_type,
    wrong_words,
)
from compiler.kinds import (
    LEAVES,
    SCALARS,
    Field,
    Leaf,
    Length,
    Range,
    fields_of,
    has_key,
    is_union,
    kind_of,
    leaf_of,
    members,
    origin_of,
    shapes_of,
    tag_of,
    tag_values,
    tagged_paths,
    type_words,
)
from compiler.source import Merged, Source
from compiler.spans import KeyPath

__all__ = [
    "Length",
    "Range",
    "converter",
    "register_leaf",
    "structure",
    "tagged_paths",
    "type_words",
]

T = TypeVar("T")
Hook = Callable[[Any, Any], Any]
"""Takes (value, type); returns the value or raises Rejected."""
LARGEST = 1_000_000
"""Of a number with a fraction; none is about more, and far beyond it float32 overflows."""
_WHOLE = re.compile(r"-?(?:0|[1-9][0-9]{0,17})", re.A)


def register_leaf(
    kind: type[T],
    parse: Callable[[Any], T],
    expects: str,
    *,
    code: str = "bad-unit",
    examples: tuple[str, ...] = (),
) -> None:
    """Teach `structure` a type written as a string or number.

    `parse` raises ValueError(sentence) for a bad value. A class of ours needs no registration:
    it has `parse` (classmethod) and the class variables `expects`, and may have `code`, `examples`.
    """
    LEAVES[kind] = Leaf(parse, expects, code, examples)
    converter.cache_clear()


def structure(
    data: Mapping[str, Any],
    cls: type[T],
    located: Source | Merged,
    synonyms: Mapping[str, str] | None = None,
) -> tuple[T | None, list[Diagnostic]]:
    """`data` as a `cls`, or None and every fault, in file order.

    `located` says where each key and value stands. `synonyms` maps names known from other
    trainers to the dotted path here (`learning_rate -> train.optimizer.lr`).
    """
    try:
        return converter().get_structure_hook(cls)(data, cls), []
    except Rejected as rejected:
        faults = [placed_elsewhere(fault, cls, synonyms or {}) for fault in rejected.faults]
    return None, to_diagnostics(without_echoes(faults), located)


@functools.cache
def converter() -> cattrs.Converter:
    """The converter with all our hooks; it knows only what a recipe may hold."""
    made = cattrs.Converter()
    register = made.register_structure_hook_factory
    register(lambda kind: True, _unsupported)
    register(lambda kind: kind is Any, lambda kind: lambda value, _: value)
    register(lambda kind: origin_of(kind) in (tuple, list, frozenset), _array(made))
    register(lambda kind: origin_of(kind) is dict, _dict(made))
    register(attrs.has, _table(made))
    register(lambda kind: leaf_of(kind) is not None, lambda kind: _leaf(leaf_of(kind)))
    register(lambda kind: origin_of(kind) is Literal, _literal)
    register(is_union, _union(made))
    register(lambda kind: origin_of(kind) is Annotated, _annotated(made))
    for plain, hook in ((bool, _bool), (int, _int), (float, _float), (str, _str)):
        made.register_structure_hook(plain, hook)
    made.register_structure_hook(enum.Enum, _enum)
    for kind, leaf in LEAVES.items():
        made.register_structure_hook(kind, _leaf(leaf))
    return made


def _unsupported(kind: Any) -> Hook:
    raise TypeError(f"a recipe cannot hold {kind!r}")


def _bool(value: Any, _: Any) -> bool:
    if type(value) is not bool:
        raise wrong_type(value, bool)
    return value


def _int(value: Any, _: Any) -> int:
    if type(value) is not int:
        raise wrong_type(value, int)
    if not -INT64 <= value < INT64:
        raise reject("out-of-range", "this number does not fit in 64 bits")
    return value


def _float(value: Any, _: Any) -> float:
    number = _any_float(value)
    if not math.isfinite(number):
        raise reject("out-of-range", "{text} is not a finite number")
    if abs(number) > LARGEST:
        label = f"nothing in a recipe is beyond {LARGEST:,}"
        raise reject("out-of-range", "{text} is out of range", label=label)
    return number


def _any_float(value: Any, _: Any = None) -> float:
    if type(value) is int:
        return float(_int(value, int))
    if type(value) is not float:
        raise wrong_type(value, float)
    return value


def _str(value: Any, _: Any) -> str:
    if type(value) is not str:
        raise wrong_type(value, str)
    return value


def _enum(value: Any, kind: Any) -> Any:
    for item in kind:
        if type(item.value) is type(value) and item.value == value:
            return item
    raise no_choice(value, kind, [item.value for item in kind])


def _literal(kind: Any) -> Hook:
    allowed = typing.get_args(kind)

    def hook(value: Any, _: Any) -> Any:
        for item in allowed:
            if type(item) is type(value) and item == value:
                return value
        raise no_choice(value, kind, allowed)

    return hook


def _leaf(leaf: Leaf | None) -> Hook:
    assert leaf is not None

    def hook(value: Any, _: Any) -> Any:
        if type(value) not in (str, int, float):
            raise wrong_words(value, leaf.expects)
        try:
            return leaf.parse(value)
        except ValueError as error:
            message = escaped(getattr(error, "message", str(error)))
            advice = escaped(getattr(error, "advice", ""))
            if type(value) is not str:  # the user's own digits, not Python's
                message = message.replace(str(value), "{text}")
                advice = advice.replace(str(value), "{text}")
                advice = re.sub(r"^say `([^`]*)`$", r'write `{set}"\1"`', advice)
            raise reject(leaf.code, message, advice=advice) from None

    return hook


def _annotated(made: cattrs.Converter) -> Callable[[Any], Hook]:
    def factory(kind: Any) -> Hook:
        inner, *limits = typing.get_args(kind)
        loose = any(isinstance(limit, Range) and limit.nonfinite for limit in limits)
        base: Hook = _any_float if loose and inner is float else made.get_structure_hook(inner)

        def hook(value: Any, _: Any) -> Any:
            result = base(value, inner)
            for limit in limits:
                if isinstance(limit, Range) and isinstance(result, int | float):
                    check_range(result, limit)
                elif isinstance(limit, Length) and hasattr(result, "__len__"):
                    check_length(result, limit)
            return result

        return hook

    return factory


def _array(made: cattrs.Converter) -> Callable[[Any], Hook]:
    def factory(kind: Any) -> Hook:
        origin, args = origin_of(kind), typing.get_args(kind)
        fixed = origin is tuple and args[-1:] != (...,)
        hooks = [(made.get_structure_hook(item), item) for item in args if item is not ...]

        def hook(value: Any, _: Any) -> Any:
            if type(value) is not list:
                raise wrong_type(value, kind)
            if fixed and len(value) != len(hooks):
                message = f"`{{key}}` must have {count(len(hooks), 'entry')}, not {len(value)}"
                raise reject("wrong-type", message)
            faults: list[Fault] = []
            pairs = zip(value, hooks if fixed else hooks * len(value), strict=True)
            result = [
                _collect(faults, (at,), one, item, part)
                for at, (item, (one, part)) in enumerate(pairs)
            ]
            _raise(faults)
            return origin(result)

        return hook

    return factory


def _dict(made: cattrs.Converter) -> Callable[[Any], Hook]:
    def factory(kind: Any) -> Hook:
        key_type, value_type = typing.get_args(kind)
        key_hook = _key(key_type, made.get_structure_hook(key_type))
        value_hook = made.get_structure_hook(value_type)

        def hook(value: Any, _: Any) -> Any:
            if type(value) is not dict:
                raise wrong_type(value, kind)
            faults: list[Fault] = []
            pairs = [
                (
                    _collect(faults, (), key_hook, key, key_type),
                    _collect(faults, (key,), value_hook, item, value_type),
                )
                for key, item in value.items()
            ]
            _raise(faults)
            return dict(pairs)

        return hook

    return factory


def _key(kind: Any, inner: Hook) -> Hook:
    """A key of a free table; a number where the keys are numbers (`{ 512 = 4 }`)."""
    base = typing.get_args(kind)[0] if origin_of(kind) is Annotated else kind

    def hook(key: str, _: Any) -> Any:
        is_number = base is int and _WHOLE.fullmatch(key)
        try:
            return inner(int(key) if is_number else key, kind)
        except Rejected as rejected:
            fault = rejected.faults[0]
            if base is int and not is_number:
                fault = Fault((), "wrong-type", "key `{text}` {table} must be a whole number")
            here = fault._replace(path=(key,), of="key", text=key, help="")
            raise Rejected([here]) from None

    return hook


def _table(made: cattrs.Converter) -> Callable[[Any], Hook]:
    def factory(cls: Any) -> Hook:
        fields = {field.key: field for field in fields_of(cls)}
        hooks = {key: made.get_structure_hook(field.type) for key, field in fields.items()}
        short = getattr(cls, "__shorthand__", None)

        def hook(value: Any, _: Any) -> Any:
            if short is not None and kind_of(value) in SCALARS:
                value = {short: value}
            if type(value) is not dict:
                raise wrong_type(value, cls)
            faults = key_faults(value, fields)
            given = {
                field.name: _collect(faults, (key,), hooks[key], value[key], field.type)
                for key, field in fields.items()
                if key in value
            }
            _raise(faults)
            return cls(**given)

        return hook

    return factory


def _union(made: cattrs.Converter) -> Callable[[Any], Hook]:
    def factory(kind: Any) -> Hook:
        options = members(kind)
        classes = tuple(item for item in options if attrs.has(item) and leaf_of(item) is None)
        tag = tag_of(classes) if len(classes) > 1 else None
        if len(classes) > 1 and tag is None:
            raise TypeError(f"nothing tells the tables of {kind!r} apart: give each a `kind`")
        hooks = [(item, made.get_structure_hook(item), shapes_of(item)) for item in options]
        short = any(getattr(cls, "__shorthand__", None) == tag for cls in classes)
        others = [item for item in options if item not in classes]

        def hook(value: Any, _: Any) -> Any:
            shape = kind_of(value)
            is_short = short and shape == "str" and not _taken(value, others)
            if tag is not None and (shape == "table" or is_short):
                return _tagged(made, value, classes, tag)
            failures: list[tuple[Any, Rejected]] = []
            for item, one, shapes in hooks:
                try:
                    if shape in shapes:
                        return one(value, item)
                except Rejected as rejected:
                    failures.append((item, rejected))
            raise no_option(value, kind, failures) if failures else wrong_type(value, kind)

        return hook

    return factory


def _taken(text: str, options: Sequence[Any]) -> bool:
    """Whether one of the types of a union takes a string as it is."""
    return any(
        text in typing.get_args(one) if origin_of(one) is Literal else "str" in shapes_of(one)
        for one in options
    )


def _tagged(made: cattrs.Converter, value: Any, classes: Sequence[type], tag: str) -> Any:
    """One of several tables, chosen by its tag."""
    table = value if isinstance(value, dict) else {tag: value}
    known = {item: cls for cls in classes for item in tag_values(cls, tag)}
    kind = Literal[tuple(known)]  # type: ignore[valid-type]
    if tag not in table:
        near = [key for key in table if nearest(key, [tag]) and not has_key(classes, key)]
        if near:
            raise Rejected([unknown_key(near[0], [tag], {}, ())])
        missing = Field(tag, tag, kind, True, attrs.NOTHING, {})
        raise Rejected([Fault((), "missing-key", "", of="table", missing=(missing,))])
    chosen = table[tag]
    if not isinstance(chosen, str) or chosen not in known:
        fault = no_choice(chosen, kind, list(known)).faults[0]
        raise Rejected([fault._replace(path=(tag,))])
    cls = known[chosen]
    return made.get_structure_hook(cls)(table, cls)


def _collect(faults: list[Fault], prefix: KeyPath, hook: Hook, value: Any, kind: Any) -> Any:
    """What a hook makes of a value; its faults are kept, with the path they lie under."""
    try:
        return hook(value, kind)
    except Rejected as rejected:
        faults += [fault._replace(path=prefix + fault.path) for fault in rejected.faults]
        return None


def _raise(faults: list[Fault]) -> None:
    if faults:
        raise Rejected(faults)
