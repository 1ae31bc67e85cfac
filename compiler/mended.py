"""What is left of a recipe without its refused values, so that the rest is judged all the same.

A person should see every mistake at once, also those that only the file system or the data show. A
refused value is taken out; where it must be given, a stand-in takes its place. Stand-ins never
reach a plan. What a pass then says only because of a refused value is an echo of the first message
and is left out: one mistake, one message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import attrs

from compiler.diagnostics import Diagnostic
from compiler.kinds import fields_of, is_union, leaf_of, members, origin_of
from compiler.source import dotted
from compiler.spans import KeyPath

_CAPTIONS = re.compile(r"(^|\.)captions(\.|$)")
_SIZES = frozenset({"resolution", "resolution_type", "multiple", "max_size", "crop", "resize"})
_COUNTS = frozenset({"epochs", "steps", "batch_size", "accumulate", "devices", "repeats", "weight"})
_RESTS_ON = {
    "upscaled": _SIZES,
    "crop-too-large": _SIZES,
    "unusual-size": _SIZES,
    "small-buckets": _SIZES | _COUNTS,
    "interval-too-long": _COUNTS,
    "idle-devices": _COUNTS,
    "long-warmup": _COUNTS,
}
"""Keys, refused values of which make a pass say what it would not say of right ones."""
_OF_COUNTS = [code for code, keys in _RESTS_ON.items() if keys & _COUNTS]
NO_TEXT = "\0"  # neither a name, nor a path, nor a family


def mended(
    data: Mapping[str, Any], cls: type, blamed: frozenset[str]
) -> tuple[dict[str, Any], frozenset[str]]:
    """`data` without what stands at the dotted paths `blamed`; and these with all paths that were
    taken out or stood in for."""
    touched = set(blamed)
    kept = _without(data, (), blamed, touched)
    return _filled(kept, cls, (), touched), frozenset(touched)


def blamed_by(diagnostics: Iterable[Diagnostic]) -> frozenset[str]:
    """The dotted paths that errors blame, and those that misspelt keys were meant to be."""
    errors = [fault for fault in diagnostics if fault.severity == "error"]
    return frozenset(path for fault in errors for path in (fault.path, fault.meant) if path)


def is_echo(fault: Diagnostic, blamed: frozenset[str]) -> bool:
    """Whether what a pass says follows from a value that was refused before."""
    if any(below(fault.path, path) for path in blamed):
        return True
    table = fault.path.rpartition(".")[0]
    beside = [path for path in blamed if path.rpartition(".")[0] == table]
    inside = [path for path in blamed if path.startswith(f"{fault.path}.")]
    if fault.code == "no-effect":  # what it says of one key rests on the others of its table
        return bool(inside or (table and beside))
    if fault.code == "missing-key":
        return any(path.removeprefix(f"{fault.path}.") in fault.message for path in inside) or (
            fault.path == "data" and "data.source" in blamed
        )
    if fault.code in _RESTS_ON:
        return any(path.rpartition(".")[2] in _RESTS_ON[fault.code] for path in blamed)
    about_captions = fault.code == "missing-captions"
    return about_captions and any(_CAPTIONS.search(path) for path in blamed)


def without_miscounts(diagnostics: Sequence[Diagnostic]) -> list[Diagnostic]:
    """Without warnings that rest on how much there is to train, where the data are refused."""
    refused = any(d.severity == "error" and below(d.path, "data.source") for d in diagnostics)
    return [
        d
        for d in diagnostics
        if not refused
        or d.severity == "error"
        or not (d.code in _OF_COUNTS or (d.code, d.path) == ("no-effect", "train.accumulate"))
    ]


def below(path: str, blamed: str) -> bool:
    """Whether `path` is `blamed` or inside it."""
    return path == blamed or path.startswith((f"{blamed}.", f"{blamed}["))


def _without(
    table: Mapping[str, Any], path: KeyPath, blamed: frozenset[str], touched: set[str]
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in table.items():
        here = (*path, key)
        if dotted(here) in blamed:
            continue
        if isinstance(value, dict):
            kept[key] = _without(value, here, blamed, touched)
        elif not isinstance(value, list):
            kept[key] = value
        elif any(dotted((*here, at)) in blamed for at in range(len(value))):
            touched.add(dotted(here))  # without one of its entries the others would change places
        else:
            kept[key] = [
                _without(entry, (*here, at), blamed, touched) if isinstance(entry, dict) else entry
                for at, entry in enumerate(value)
            ]
    return kept


def _filled(table: dict[str, Any], cls: type, path: KeyPath, touched: set[str]) -> dict[str, Any]:
    """`table` with a stand-in for each required key that it lacks, at any depth."""
    filled = dict(table)
    for field in fields_of(cls):
        inner, here = _table_of(field.type), (*path, field.key)
        value = filled.get(field.key)
        if field.key not in filled:
            if field.required:
                filled[field.key] = _stand_in(field.type)
                touched.add(dotted(here))
        elif inner is not None and isinstance(value, dict):
            filled[field.key] = _filled(value, inner, here, touched)
        elif inner is not None and isinstance(value, list):
            filled[field.key] = [
                _filled(entry, inner, (*here, at), touched) if isinstance(entry, dict) else entry
                for at, entry in enumerate(value)
            ]
    return filled


def _table_of(kind: Any) -> type | None:
    """The only class of tables that a type takes, directly or as entries of an array."""
    if leaf_of(kind) is not None:
        return None
    if isinstance(kind, type) and attrs.has(kind):
        return kind
    inside = members(kind) if is_union(kind) else get_args(kind)
    if origin_of(kind) in (dict, Literal):
        return None
    found = [table for item in inside if (table := _table_of(item)) is not None]
    return found[0] if len(found) == 1 else None


def _stand_in(kind: Any) -> Any:
    """A value of the type, which nothing is ever made of."""
    origin = origin_of(kind)
    if origin is Annotated:
        return _stand_in(get_args(kind)[0])
    if is_union(kind):
        return _stand_in(members(kind)[0])
    if origin is Literal:
        return get_args(kind)[0]
    if origin in (tuple, list, frozenset):
        return []
    if isinstance(kind, type) and attrs.has(kind) and leaf_of(kind) is None:
        return _filled({}, kind, (), set())
    return {str: NO_TEXT, int: 1, float: 1.0, bool: False}.get(kind, {})
