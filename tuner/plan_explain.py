"""`tuner plan --explain KEY`: one value of the plan, who gave it and what it means."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from compiler.plan import Decision
from tuner.exits import DONE, REFUSED
from tuner.layout import columns, section, wrapped
from tuner.screen import err, out

if TYPE_CHECKING:
    from compiler.reference import Row

FORMAT_VERSION = 1
EMPTY = '""'
_ENTRY = re.compile(r"\.(\d+)(?=\.|$)")  # data.source.0.path is data.source[0].path, as in --set


def explain_key(
    known: Sequence[Decision], key: str, *, whole: bool = True, as_json: bool = False
) -> int:
    """A key, or a table's keys, on stdout; 2 if the recipe language has no such key.

    `known` is what the compiler decided; all of it if `whole`, else what errors let it decide."""
    from compiler.reference import row_of

    found = _meant(known, key)
    if len(found) != 1:
        err(f"error: the recipe has no key `{key}`" if not found else _several(key, found))
        guess = "" if found else _nearest(known, key)
        err(f"help: did you mean `{guess}`?" if guess else "help: `tuner plan -v` lists all keys")
        return REFUSED
    row = row_of(found[0])
    assert row is not None, "what is meant is a key of the schema"
    decisions = [decision for decision in known if _is_below(decision.key, found[0])]
    if as_json:
        out(json.dumps(_object(found[0], row, decisions), indent=2))
    else:
        out(text(found[0], row, decisions, whole=whole))
    return DONE


def text(key: str, row: Row, decisions: list[Decision], *, whole: bool = True) -> str:
    """What is known of a key: its value in this plan first, then what it may be."""
    own = next((decision for decision in decisions if decision.key == key), None)
    lines = [key, ""]
    if own is not None:
        lines += section("value", own.value or EMPTY) + section("from", origin(own))
    elif decisions:
        lines += columns([(d.key, d.value or EMPTY, origin(d)) for d in decisions])
    elif whole:
        lines += section("value", "none: this recipe leaves its table out")
    else:
        lines += section("value", "not known, because the recipe has errors")
    if row.doc:
        lines += ["", *wrapped(row.doc, "", "")]
    if own is not None or not row.table:
        lines += ["", *takes(row)]
    return "\n".join(lines)


def origin(decision: Decision) -> str:
    """Who gave a value, and why where that is known."""
    source = decision.source
    if source.startswith("pass "):
        source = f"decided by {source}"
    elif source == "--set":
        source = "override (--set)"
    elif ":" not in source and decision.why:
        return f"{source}, {decision.why}"
    return f"{source}, because {decision.why}" if decision.why else source


def takes(row: Row) -> list[str]:
    """What values a key takes, and which it has where a recipe leaves it out."""
    bounds = f", {row.range}" if row.range else ""
    unit = f" ({row.unit})" if row.unit else ""
    default = row.default or ("none, it is required" if row.required else "left out")
    return section("takes", f"{row.words}{bounds}{unit}") + section("default", default)


def _object(key: str, row: Row, decisions: Iterable[Decision]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "key": key,
        "decisions": [
            {"key": d.key, "value": d.value, "source": d.source, "why": d.why} for d in decisions
        ],
        "doc": row.doc,
        "type": row.words,
        "range": row.range,
        "default": row.default or None,
        "required": row.required,
    }


def _meant(decisions: Sequence[Decision], key: str) -> list[str]:
    """The keys that `key` may be: itself, or those that end in it."""
    from compiler.reference import row_of

    key = _ENTRY.sub(r"[\1]", key.strip().strip("."))
    known = _known(decisions)
    if key in known or (row_of(key) is not None and "[" not in key):
        return [key]
    return [name for name in known if name.endswith(f".{key}")]


def _known(decisions: Sequence[Decision]) -> list[str]:
    """Every key and table: those that were decided, and what the recipe leaves out."""
    from compiler.reference import all_rows

    keys = [decision.key for decision in decisions]
    tables = [key.rpartition(".")[0] for key in keys if "." in key]
    rest = [row.key for row in all_rows() if "[]" not in row.key]
    return list(dict.fromkeys([*keys, *tables, *rest]))


def _nearest(decisions: Sequence[Decision], key: str) -> str:
    """The whole key that was probably meant; a misspelt last part is enough."""
    from compiler.diagnostics import nearest
    from compiler.synonyms import SYNONYMS

    known = _known(decisions)
    guess = nearest(key, known, SYNONYMS)
    if guess is not None:
        return guess
    by_end = {name.rpartition(".")[2]: name for name in reversed(known)}
    return by_end.get(nearest(key.rpartition(".")[2], by_end) or "", "")


def _several(key: str, found: list[str]) -> str:
    from compiler.diagnostics import choices

    return f"error: `{key}` may be {choices(found)}"


def _is_below(key: str, above: str) -> bool:
    return key == above or key.startswith((f"{above}.", f"{above}["))
