"""Faults of a recipe's values: how they are worded, and how they become diagnostics.

A hook knows a value, not its place, so a `Fault` leaves open what only the source can tell.
"""

import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import attrs

from compiler.diagnostics import Diagnostic, choices, nearest, shown
from compiler.kinds import (
    SCALARS,
    Field,
    Length,
    Range,
    fields_of,
    is_union,
    kind_of,
    literal_words,
    members,
    only_shape,
    origin_of,
    places,
    shapes_of,
    tables,
    tables_in,
    takes_text,
    type_words,
)
from compiler.source import Merged, Source, dotted
from compiler.spans import KeyPath
from compiler.synonyms import ABSENT, ELSEWHERE, WORDS

MAX_SHOWN = 200
"""Diagnostics of one recipe; a file of megabytes may hold a fault in every line."""
INT64 = 2**63
_AS_TABLE = "{as table}"
_NUMBER = re.compile(r"[+-]?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?", re.A)
_SIZE = re.compile(r"([0-9]{2,5}) *[xX*] *([0-9]{2,5})", re.A)
_SECRETS = ("token", "hf_token", "hub_token", "api_key", "wandb_api_key", "password", "secret")
_NO_SECRETS = (
    "a recipe holds no secrets: log in with `hf auth login`, or set the variable that the service "
    "reads, such as WANDB_API_KEY"
)
_BESIDE = {"data.source.evaluation": "; to hold pictures of this source out of training: `holdout`"}
"""What else was probably meant by a table that was written into another one."""
Part = Literal["key", "value", "table"]


class Fault(NamedTuple):
    """A fault at a path relative to the value it was found in.

    In its texts `{key}` is the key as the user sees it, `{value}` the user's own text, `{text}`
    the same without quotes, `{table}` the table as the file spells it ("in [adapter]").
    """

    path: KeyPath
    code: str
    message: str
    of: Part = "value"
    label: str = ""
    help: str = ""
    unknown: str = ""
    """The key nobody knows."""
    meant: str = ""
    """The key of the same table that was probably meant."""
    missing: tuple[Field, ...] = ()
    text: str | None = None
    """What `{text}` and `{value}` show, where the source has no text of its own for it."""


class Rejected(Exception):
    """A value does not fit its type; carries all faults found in it."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__(faults)
        self.faults = faults


def reject(code: str, message: str, label: str = "", advice: str = "") -> Rejected:
    """A rejection with one fault of the value itself."""
    return Rejected([Fault((), code, message, label=label, help=advice)])


def wrong_type(value: Any, kind: Any) -> Rejected:
    """A value of another TOML type than its field takes; with what to write instead."""
    rejected = wrong_words(value, type_words(kind))
    advice = _type_advice(value, kind)
    return Rejected([fault._replace(help=advice) for fault in rejected.faults])


def wrong_words(value: Any, expected: str) -> Rejected:
    """The same, where only words tell what is expected."""
    found = {
        "bool": "found {value}",
        "int": "found the number {value}",
        "float": "found the number {value}",
        "str": "found the string {value}",
        "table": "found a table",
        "array": "found an array",
        "date": "found the date {value}",
    }[kind_of(value)]
    advice = "put it in quotes" if kind_of(value) == "date" and "string" in expected else ""
    if kind_of(value) == "date" and not advice:
        advice = "a recipe holds no dates"
    return reject("wrong-type", f"`{{key}}` must be {escaped(expected)}, {found}", advice=advice)


def _type_advice(value: Any, kind: Any) -> str:
    """What to write instead of a value of the wrong type, where that can be told."""
    shapes, shape = shapes_of(kind), kind_of(value)
    if shape == "bool" and (word := _switch(value, kind)):
        return f'write `{{set}}"{word}"`'
    if shape in SCALARS and "array" not in shapes and (table := _in_table(value, kind)):
        return table
    if shape == "date":
        text_too = 'write `{set}"{text}"` if text is meant'
        return text_too if takes_text(kind) else "a recipe holds no dates"
    if shape == "str":
        return _unquoted(value, kind)
    if shape == "table" and "array" in shapes and any(tables_in(kind)):
        return "write `[[{path}]]`, once for each entry"
    if shape == "array" and shapes == {"table"} and all(isinstance(one, dict) for one in value):
        return "there is only one: write `[{path}]`, with single brackets"
    if shape == "array" and len(value) == 1 and kind_of(value[0]) in shapes:
        return "write one value, without the brackets"
    if shape == "float" and "int" in shapes and math.isfinite(value) and value == int(value):
        return f"write `{{set}}{int(value)}`" if abs(value) < INT64 else ""
    if shape in SCALARS and takes_text(kind):
        return 'write `{set}"{text}"`'
    if shape in SCALARS and shape in _entries(kind):
        return "write `{set}[{raw}]`"
    if shape in SCALARS and "table" in shapes and attrs.has(kind):
        return _AS_TABLE
    return ""


def _switch(value: bool, kind: Any) -> str:
    """The word that turns on or off what takes words instead of true and false; "" if unclear."""
    words = _words_of(kind)
    off = next((word for word in ("off", "none") if word in words), "")
    if not off or not value:
        return off
    on = [word for word in words if word not in (off, "auto")]
    return on[0] if len(on) == 1 else "auto" if "auto" in words else ""


def _in_table(value: Any, kind: Any) -> str:
    """How to write the table that a plain value stands for; "" where none of its keys takes it."""
    tables = list(tables_in(kind))
    if len(tables) != 1:
        return ""
    fields = fields_of(tables[0])
    needed = [field for field in fields if field.required]
    if value is True and all(_words_of(field.type) for field in needed):
        inside = ", ".join(f'{field.key} = "{_words_of(field.type)[0]}"' for field in needed)
        return f"write `{{set}}{{{{}} {inside} }}`" if inside else "write `{set}{{}}`"
    for field in fields if isinstance(value, str) else ():
        if value in _words_of(field.type) or (field.key == "name" and takes_text(field.type)):
            more = "".join(f", {f.key} = ..." for f in fields if f.required and f != field)
            return f'write `{{set}}{{{{}} {field.key} = "{{text}}"{more} }}`'
    return ""


def _words_of(kind: Any) -> tuple[str, ...]:
    """The words that a type takes, "auto" last."""
    options = members(kind) if is_union(kind) else (kind,)
    found = [
        word
        for one in options
        if origin_of(one) is Literal
        for word in typing.get_args(one)
        if isinstance(word, str)
    ]
    return tuple(sorted(found, key=lambda word: word == "auto"))


def _entries(kind: Any) -> frozenset[str]:
    """The shapes of the entries of the arrays that a type takes."""
    options = members(kind) if is_union(kind) else (kind,)
    found: set[str] = set()
    for one in options:
        bare, *limits = typing.get_args(one) if origin_of(one) is Annotated else (one,)
        if any(isinstance(limit, Length) and limit.ge > 1 for limit in limits):
            continue  # one entry would not do
        if origin_of(bare) in (tuple, list, frozenset):
            found |= {
                s for item in typing.get_args(bare) if item is not ... for s in shapes_of(item)
            }
    return frozenset(found)


def _unquoted(value: str, kind: Any) -> str:
    shapes, word = shapes_of(kind), value.strip()
    if "int" in shapes and re.fullmatch(r"[+-]?(?:0|[1-9][0-9]{0,17})", word):
        return f"write `{{set}}{word}`, without quotes"
    if "float" in shapes and len(word) < 40 and _NUMBER.fullmatch(word):
        return f"write `{{set}}{word}`, without quotes"
    if shapes == {"bool"} and word.lower() in ("true", "yes", "on", "1"):
        return "write `{set}true`"
    if shapes == {"bool"} and word.lower() in ("false", "no", "off", "0"):
        return "write `{set}false`"
    if "float" in shapes and (pixels := _SIZE.fullmatch(word)):
        return f"write one number: `{{set}}{max(int(pixels[1]), int(pixels[2]))}`"
    if "str" in _entries(kind):
        return "write `{set}[{raw}]`"
    return _AS_TABLE if shapes == {"table"} else ""


def no_choice(value: Any, kind: Any, allowed: Sequence[Any]) -> Rejected:
    """A value that is none of the choices."""
    names = [item for item in allowed if isinstance(item, str)]
    if kind_of(value) not in {kind_of(item) for item in allowed}:
        return wrong_type(value, kind)
    near = nearest(value, names, _words(names)) if isinstance(value, str) else None
    advice = f"did you mean `{near}`?" if near else f"it must be {literal_words(allowed, 20)}"
    advice = _elsewhere(str(value), names) or advice
    return reject("unknown-value", "unknown value `{text}`", advice=escaped(advice))


def _elsewhere(value: str, names: Sequence[str]) -> str:
    """What another key has of what `value` asks for; "" if nothing is known."""
    word = value.lower().replace("-", "").replace("_", "")
    return next(
        (
            advice
            for (asked, one), advice in ELSEWHERE.items()
            if one in names and word == asked.replace("-", "")
        ),
        "",
    )


def _words(names: Sequence[str]) -> dict[str, str]:
    """Other words for some of `names`."""
    return {word: name for word, name in WORDS if name in names}


def no_option(value: Any, kind: Any, failures: Sequence[tuple[Any, Rejected]]) -> Rejected:
    """A value that none of a union's fitting types takes: the most telling of their faults."""
    words = [
        item for one, _ in failures if origin_of(one) is Literal for item in typing.get_args(one)
    ]
    others = [(one, rejected) for one, rejected in failures if origin_of(one) is not Literal]
    texts = [str(word) for word in words]
    near = nearest(value, texts, _words(texts)) if isinstance(value, str) else None
    if not others or near is not None:
        numeric = isinstance(value, str) and near is None and _advice_for_text(value, kind)
        advice = f"did you mean `{near}`?" if near else numeric or f"it must be {type_words(kind)}"
        text = advice if numeric else escaped(advice)
        return reject("unknown-value", "unknown value `{text}`", advice=text)
    faults = others[-1][1].faults
    if not words or len(faults) > 1 or faults[0].help:
        return others[-1][1]
    expected = escaped(f"it must be {type_words(kind)}")
    return Rejected([faults[0]._replace(help=expected)])


def _advice_for_text(value: str, kind: Any) -> str:
    return _in_table(value, kind) or _unquoted(value, kind)


def check_range(value: float, limit: Range) -> None:
    """Raise Rejected if a number is out of its bounds."""
    low = limit.ge is not None and not value >= limit.ge
    low = low or (limit.gt is not None and not value > limit.gt)
    high = limit.le is not None and not value <= limit.le
    high = high or (limit.lt is not None and not value < limit.lt)
    if math.isnan(value) and limit.nonfinite:
        return
    if low or high:
        raise reject("out-of-range", "{text} is out of range", label=f"must be {_bounds(limit)}")


def _bounds(limit: Range) -> str:
    if limit.ge is not None and limit.le is not None:
        only = limit.ge == limit.le
        return f"{limit.ge:.12g}" if only else f"between {limit.ge:.12g} and {limit.le:.12g}"
    signs = ((">=", limit.ge), (">", limit.gt), ("<=", limit.le), ("<", limit.lt))
    return " and ".join(f"{sign} {bound:.12g}" for sign, bound in signs if bound is not None)


def check_length(value: Any, limit: Length) -> None:
    """Raise Rejected if an array, table or string is too short or too long."""
    size = len(value)
    if size >= limit.ge and (limit.le is None or size <= limit.le):
        return
    word = "character" if isinstance(value, str) else "entry"
    if size == 0:
        raise reject("out-of-range", "`{key}` is empty", label=f"needs {count(limit.ge, word)}")
    bound = f"at least {limit.ge}" if size < limit.ge else f"at most {limit.le}"
    message = f"`{{key}}` has {count(size, word)}"
    raise reject("out-of-range", message, label=f"must have {bound}")


def key_faults(table: Mapping[str, Any], fields: Mapping[str, Field]) -> list[Fault]:
    """Unknown and missing keys of a table; one that was meant by an unknown one is not missing."""
    synonyms = {
        word: field.key for field in fields.values() for word in field.metadata.get("synonyms", ())
    }
    absent = [key for key in fields if key not in table]
    faults = [
        unknown_key(key, absent, synonyms, tuple(fields)) for key in table if key not in fields
    ]
    meant = {fault.meant for fault in faults}
    missing = tuple(fields[key] for key in absent if fields[key].required and key not in meant)
    if missing:
        faults.append(Fault((), "missing-key", "", of="table", missing=missing))
    return faults


def unknown_key(
    key: str, absent: Sequence[str], synonyms: Mapping[str, str], known: Sequence[str]
) -> Fault:
    """A key that its table does not have; `absent` are those it could have been."""
    near = nearest(key, absent, synonyms)
    message = f"unknown key `{escaped(shown(key))}` {{table}}"
    advice = f"did you mean `{near}`?" if near else ""
    given = nearest(key, known, synonyms) if near is None or near not in absent else None
    if given is not None:
        near, advice = given, f"`{given}` is given too: take this one out"
    elif near is None and known:
        advice = f"known keys: {choices(known, 12)}"
    elif near is None:
        advice = "this table has no keys"
    return Fault(
        (key,),
        "unknown-key",
        message,
        of="key",
        help=escaped(advice),
        unknown=key,
        meant=near or "",
    )


def placed_elsewhere(fault: Fault, cls: type, synonyms: Mapping[str, str]) -> Fault:
    """An unknown key that belongs into another table of the recipe."""
    if not fault.unknown:
        return fault
    if fault.unknown.lower().replace("-", "_") in _SECRETS:
        return fault._replace(help=_NO_SECRETS, meant="")
    if (why := ABSENT.get(fault.unknown.lower().replace("-", "_"))) is not None:
        return fault._replace(help=why, meant="")
    known = nearest(fault.unknown, [], synonyms)
    if known is not None and (not fault.meant or fault.meant != known.rpartition(".")[2]):
        table, _, key = known.rpartition(".")
        here = ".".join(part for part in fault.path[:-1] if isinstance(part, str))
        said = f"`{key}` (`{known}`)" if table and table == here else f"`{known}`"
        return fault._replace(help=f"did you mean {escaped(said)}?", meant="." + known)
    if fault.meant:
        return fault
    known_places = places(cls).get(fault.unknown, ())
    own = ".".join(part for part in fault.path if isinstance(part, str))
    found = [place for place in known_places if not f"{own}.".startswith(f"{place}.")]
    if known_places and not found:
        return fault._replace(help=f"only another kind of this table has it; {fault.help}")
    if len(found) == 1 and found[0] == fault.unknown and fault.unknown in tables(cls):
        words = f"`[{fault.unknown}]` is a table of its own{_BESIDE.get(own, '')}"
        return fault._replace(help=words, meant="." + found[0])
    if len(found) == 1:
        return fault._replace(help=f"did you mean `{found[0]}`?", meant="." + found[0])
    if 1 < len(found) <= 4:
        return fault._replace(help=f"there are {choices(found)}")
    return fault


def without_echoes(faults: list[Fault]) -> list[Fault]:
    """Without keys that are missing only since they were put into another table."""
    meant = {fault.meant[1:] for fault in faults if fault.meant.startswith(".")}
    kept = []
    for fault in faults:
        left = tuple(
            field for field in fault.missing if dotted((*fault.path, field.key)) not in meant
        )
        if left or not fault.missing:
            kept.append(fault._replace(missing=left))
    return kept


def to_diagnostics(faults: list[Fault], located: Source | Merged) -> list[Diagnostic]:
    """Faults in file order; of very many only the first, since each costs a look at the text."""
    files = {name: at for at, name in enumerate(files_of(located))}

    def place(fault: Fault) -> tuple[int, int, int]:
        span = located.span(fault.path, fault.of)
        return files[span.file], span.line, span.column

    found = [to_diagnostic(fault, located) for fault in sorted(faults, key=place)[:MAX_SHOWN]]
    left = len(faults) - len(found)
    if left:
        message = f"{left} more faults are not shown"
        found.append(Diagnostic(code="too-many", severity="note", message=message))
    return found


def to_diagnostic(fault: Fault, located: Source | Merged) -> Diagnostic:
    """A fault with its place and its finished text."""
    path = fault.path
    message, advice = fault.message, fault.help
    if fault.missing:
        message, advice = _missing_words(fault)
        if len(fault.missing) == 1:
            path = (*path, fault.missing[0].key)
    fill = _filler(fault, located)
    return Diagnostic(
        code=fault.code,
        message=fill(message),
        span=located.span(fault.path, fault.of),
        label=fill(fault.label),
        help=fill(advice),
        path=dotted(path),
        meant=_meant(fault),
    )


def _meant(fault: Fault) -> str:
    if not fault.meant or fault.meant.startswith("."):
        return fault.meant[1:]
    return dotted((*fault.path[:-1], fault.meant))


def _filler(fault: Fault, located: Source | Merged) -> Callable[[str], str]:
    """Fills the places that a fault's texts leave open; filled-in text is never looked at again."""
    raw = fault.text if fault.text is not None else _own_text(fault, located)
    text = raw
    if raw[:1] in ('"', "'") and fault.text is None:
        text = raw.strip(raw[0])
    names = {
        "key": shown(_own_key(fault.path)),
        "path": shown(dotted(fault.path), 60),
        "set": _assignment(fault.path),
        "as table": _as_table(fault.path),
        "value": f"`{shown(raw.strip())}`",
        "raw": shown(raw.strip()),
        "text": shown(text),
        "table": _table_words(fault, located),
        "{": "{",
    }
    return lambda template: re.sub(
        r"\{(as table|\w+|\{)\}", lambda match: names[match[1]], template
    )


def _own_text(fault: Fault, located: Source | Merged) -> str:
    """What the user wrote; for a key of a shorthand that is the shorthand."""
    return located.snippet(fault.path) or located.snippet(fault.path[:-1])


def escaped(text: str) -> str:
    """Finished text as a template, so that braces in it stay what they are."""
    return text.replace("{", "{{}")


def _assignment(path: KeyPath) -> str:
    """What stands before a value on its line; nothing before an entry of an array."""
    return "" if path and isinstance(path[-1], int) else f"{shown(_own_key(path))} = "


def _as_table(path: KeyPath) -> str:
    """How to write the table at a path: with a header, or inline within an entry of an array."""
    if any(isinstance(part, int) for part in path):
        return f"write a table: `{shown(_own_key(path))} = {{ ... }}`"
    return f"write `[{shown(dotted(path), 60)}]` with a line for each key"


def _own_key(path: KeyPath) -> str:
    """The last key of a path, with the indices behind it."""
    start = max((at for at, part in enumerate(path) if isinstance(part, str)), default=0)
    return dotted(path[start:])


def _table_words(fault: Fault, located: Source | Merged) -> str:
    """The table a fault is in, as its file spells it."""
    path = fault.path if fault.missing or fault.of == "table" else fault.path[:-1]
    if not path:
        return "at the top level"
    header = _header_of(located, path)
    if header is None:
        return f"in `{shown(dotted(path), 60)}`"
    entry = next((part for part in reversed(path) if isinstance(part, int)), None)
    return f"in {header}" + (f" entry {entry + 1}" if entry is not None else "")


def _header_of(located: Source | Merged, path: KeyPath) -> str | None:
    """The header that opened a table: `[adapter]`, `[[data.source]]`; None for an inline one."""
    source, own = located.locate(path)
    if own not in source.table_spans:
        return None
    name = shown(".".join(part for part in own if isinstance(part, str)), 60)
    return f"[[{name}]]" if isinstance(own[-1], int) else f"[{name}]"


def _missing_words(fault: Fault) -> tuple[str, str]:
    names = ", ".join(f"`{field.key}`" for field in fault.missing)
    message = f"missing key{'s' * (len(fault.missing) > 1)} {names} {{table}}"
    return message, "add " + " and ".join(_to_add(fault.path, field) for field in fault.missing)


def _to_add(path: KeyPath, field: Field) -> str:
    here = ".".join([part for part in path if isinstance(part, str)] + [field.key])
    tables = list(tables_in(field.type))
    if tables and only_shape(field.type) == "array":
        return f"`[[{here}]]`"
    if tables:
        return f"`[{here}]`"
    return f"`{field.key} = ...` ({escaped(type_words(field.type))})"


def files_of(located: Source | Merged) -> list[str]:
    """Files in the order to report them: the recipe, what it extends, the command line."""
    sources = [located] if isinstance(located, Source) else list(reversed(located.sources))
    return [source.name for source in sorted(sources, key=lambda one: one.kind == "override")]


def count(number: int, word: str) -> str:
    """A number of things, with its word in the plural where needed."""
    plural = word[:-1] + "ies" if word.endswith("y") else word + "s"
    return f"{number} {word if number == 1 else plural}"
