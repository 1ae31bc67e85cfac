"""Why a text is not TOML, in words: `tomllib`'s complaint and its position, made helpful.

`tomllib` stops at the first fault. `load` takes the faulty statement out and asks again, so that
one look at a file shows (nearly) all of its faults.
"""

import re
import tomllib
import unicodedata
from typing import Any, NamedTuple

from compiler.diagnostics import shown
from compiler.spans import MAX_DEPTH, MAX_VALUES, Extent, Lines, Scan, Statement, scan

MAX_LOOKS = 40
"""Faulty statements taken out before giving up."""
MAX_READ = 2**20
"""Characters read in all of these; each look reads the whole text again."""
INT64 = 2**63

_AT = re.compile(r"^(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|.*)\)$", re.S)
_PAIR_AHEAD = re.compile(
    r"""[ \t]*(?:[A-Za-z0-9_.-]+[ \t]*=|\[+[A-Za-z0-9_."' -]+\]+[ \t]*(?:#|$))""", re.M
)
_ENTRY = re.compile(
    r"""\s*(?:[\]}]|["'\[{].*,\s*(?:\#.*)?$|[^\s=\[]+\s*,|[-+.0-9]+\s*$|"[^"]*"\s*$|'[^']*'\s*$)""",
    re.A,
)
"""A line that can only be an entry or the end of an array or table begun above."""
_TOKEN = re.compile(r"[^\n#,\]}]*")
_REST = re.compile(r"[^\n]*")
_WORDS = {
    "true": "true",
    "yes": "true",
    "on": "true",
    "false": "false",
    "no": "false",
    "off": "false",
}
_NOTHING = ("none", "null", "nil", "undefined", "~")
_CURLY = "\u2018\u2019\u201c\u201d\u00ab\u00bb\u201e\u201a"
_BAD_NUMBER = re.compile(r"[+-]?(?:\d[\d_]*)?\.?[\d_]*(?:[eE][+-]?\d+)?")


class Fault(NamedTuple):
    """One fault of a text, by offsets."""

    extent: Extent
    message: str
    help: str = ""
    label: str = ""
    code: str = "invalid-toml"
    first: Extent | None = None
    """Of a duplicate: where the first one is."""
    resume: int = -1
    """Where good text goes on, if that is before the place where `tomllib` gave up."""


class Loaded(NamedTuple):
    """What could be read of a text; `data` counts only if there are no faults."""

    data: dict[str, Any]
    scan: Scan
    faults: list[Fault]


class _Case(NamedTuple):
    """A complaint with what is needed to explain it."""

    text: str
    at: int
    what: str
    statement: Statement
    scan: Scan
    opened: list[int]
    """Where the brackets and strings begin that are open at `at`."""

    @property
    def rest(self) -> str:
        """The line from the offending character on, without comment."""
        return _rest(self.text, self.at).split("#")[0].rstrip()

    @property
    def key(self) -> str:
        """The key of the statement as written; empty for a header."""
        head = self.text[self.statement.start : self.at].split("\n")[0]
        return "" if self.statement.is_header else head.partition("=")[0].strip()


def load(text: str) -> Loaded:
    """Data, offsets and all faults of a text whose lines end in a line feed."""
    faults: list[Fault] = []
    whole, last, looks = text, 0, 0
    while True:
        found = scan(text)
        data, fault, statement = _look(text, found)
        more = [fault] if fault else _wide_numbers(data, found)
        if statement is None or not _goes_on(text, statement, last):
            faults += [_moved(one, Lines(text), Lines(whole)) for one in more]
        looks += 1
        hopeless = statement is None or statement.end >= len(text.rstrip())
        if hopeless or looks >= MAX_LOOKS or looks * len(whole) > MAX_READ:
            return Loaded(data, found, sorted(faults, key=lambda one: one.extent))
        assert statement is not None
        last = Lines(text).place(statement.end)[0]
        text = _without(text, statement)


def _look(text: str, found: Scan) -> tuple[dict[str, Any], Fault | None, Statement | None]:
    """The data of a text, or its first fault and, where the rest can still be read, its place."""
    if found.too_deep is not None:
        return {}, _deep((found.too_deep, found.too_deep + 1)), None
    if found.too_many is not None:
        message = f"a recipe with more than {MAX_VALUES} values is refused"
        return {}, Fault((found.too_many, found.too_many + 1), message, code="file-too-large"), None
    if found.too_long:
        return {}, _too_wide(found.too_long[0]), None
    try:
        return tomllib.loads(text), None, None
    except tomllib.TOMLDecodeError as error:
        statement, fault = _explain(text, found, str(error))
        return {}, fault, statement
    except RecursionError:
        return {}, _deep((0, 1)), None
    except ValueError:  # a number that int() refuses, where the scanner did not get to
        return {}, _too_wide((0, 1)), None


def _goes_on(text: str, statement: Statement, last: int) -> bool:
    """Whether a faulty line is but the rest of the array or table that broke above it.

    `last` is the last line of the faulty statement before, or 0.
    """
    lines = text.split("\n")
    line = text.count("\n", 0, statement.start)
    between = lines[last:line]
    return bool(last) and not any(map(str.strip, between)) and bool(_ENTRY.match(lines[line]))


def _moved(fault: Fault, edited: Lines, whole: Lines) -> Fault:
    """A fault of an edited text, whose lines are those of the whole text, by its offsets there."""

    def move(extent: Extent) -> Extent:
        places = [edited.place(offset) for offset in extent]
        begin, end = (whole.starts[line - 1] + column - 1 for line, column in places)
        return begin, end

    first = None if fault.first is None else move(fault.first)
    return fault._replace(extent=move(fault.extent), first=first)


def _without(text: str, statement: Statement) -> str:
    """The text with a statement blanked out; all other lines stay as and where they are.

    In place of a header comes one nobody else uses, lest the keys below fall into the wrong table.
    """
    start = text.rfind("\n", 0, statement.start) + 1
    end = text.find("\n", statement.end)
    end = len(text) if end < 0 else end
    header = f'["\\u0007{statement.start}"]' if statement.is_header else ""
    return text[:start] + header + "\n" * text.count("\n", start, end) + text[end:]


def _deep(extent: Extent) -> Fault:
    message = f"tables and arrays are nested deeper than {MAX_DEPTH} levels"
    return Fault(extent, message, code="nested-too-deep")


def _too_wide(extent: Extent) -> Fault:
    return Fault(extent, "this number does not fit in 64 bits", code="out-of-range")


def _wide_numbers(data: dict[str, Any], found: Scan) -> list[Fault]:
    """Whole numbers beyond TOML's 64 bits; `tomllib` takes any."""
    faults = []
    for path, extent in found.values.items():
        token = found.text[extent[0] : extent[1]]
        if len(token) < 17 or token[0] not in "+-0123456789":
            continue
        value: Any = data
        for part in path:
            value = value[part]
        if isinstance(value, int) and not -INT64 <= value < INT64:
            faults.append(_too_wide(extent))
    return faults


def _explain(text: str, found: Scan, complaint: str) -> tuple[Statement, Fault]:
    """The statement at fault and what to say about it."""
    match = _AT.match(complaint)
    what = match["what"] if match else complaint
    at = len(text)
    if match and match["line"]:
        at = Lines(text).starts[int(match["line"]) - 1] + int(match["column"]) - 1
    statement = _statement_at(found, at)
    opened = [statement.start + offset for offset in scan(text[statement.start : at]).opened]
    case = _Case(text, at, what, statement, found, opened)
    fault = next(fault for explain in _EXPLANATIONS if (fault := explain(case)) is not None)
    end = max(statement.end, min(at, len(text)))
    return statement._replace(end=end if fault.resume < 0 else fault.resume), fault


def _statement_at(found: Scan, at: int) -> Statement:
    for statement in reversed(found.statements):
        if statement.start <= at and (found.failed is None or at < found.failed.start):
            return statement
    start = min(at, max(len(found.text) - 1, 0))
    return found.failed or Statement(start, start, (), (start, start), False)


def _duplicate(case: _Case) -> Fault | None:
    """Keys and tables given twice, or given as two different things."""
    if not case.what.startswith(("Cannot ", "Duplicate ")):
        return None
    for double in case.scan.doubles:
        if case.statement.start <= double.second[0] <= case.at:
            return _twice(double.name, double.first, double.second)
    statement, first = case.statement, case.scan.first
    for length in range(len(statement.path), 0, -1):
        known = first.get(statement.path[:length])
        if known is not None and known[0] < statement.start:
            break
    else:
        return Fault(statement.key, "this key is given twice", code="duplicate-key")
    name = shown(case.text[slice(*statement.key)])
    if length == len(statement.path) and not statement.is_header:
        return _twice(name, known, statement.key)
    return _conflict(case, statement.path[:length], known, name)


def _twice(name: str, first: Extent, second: Extent) -> Fault:
    message = f"duplicate key `{shown(name)}`"
    return Fault(second, message, "keep one of the two", code="duplicate-key", first=first)


def _conflict(case: _Case, path: tuple[str | int, ...], known: Extent, name: str) -> Fault:
    statement, other = case.statement, case.scan
    header = other.tables.get(path, (len(case.text), 0))
    again = statement.is_header and path == statement.path
    if again and header[0] < statement.start:
        message = f"duplicate table [{name}]"
        advice = f"put its keys under one [{name}], or write [[{name}]] twice for a list of tables"
        return Fault(statement.key, message, advice, code="duplicate-key", first=known)
    word = shown(str(path[-1]))
    is_value = path in other.values and other.values[path][0] < statement.start
    kind = "a value" if is_value else "a table"
    message = f"`{word}` is already given as {kind}, so `{name}` cannot add to it"
    return Fault(statement.key, message, code="duplicate-key", first=known)


def _unclosed_string(case: _Case) -> Fault | None:
    broken_line = case.what in ("Illegal character '\\n'", "Found invalid character '\\n'")
    if not (
        broken_line or case.what == "Unterminated string" or case.what.startswith("Expected \"'")
    ):
        return None
    start = case.opened[-1] if case.opened else case.statement.start
    if case.text[start : start + 1] not in ('"', "'"):
        return None
    quote = case.text[start]
    long = case.text.startswith(quote * 3, start)
    if long:
        return Fault(
            (start, start + 3), "this string is never closed", f"end it with `{quote * 3}`"
        )
    end = start + len(_rest(case.text, start).rstrip())
    advice = f"end it with `{quote}` on the same line"
    return Fault((start, end), "this string is not closed", advice, resume=end)


def _bad_character(case: _Case) -> Fault | None:
    if not case.what.startswith(("Illegal character", "Found invalid character")):
        return None
    char = case.text[case.at : case.at + 1]
    message = f"the control character U+{ord(char or chr(0)):04X} cannot stand in TOML"
    return Fault(
        (case.at, case.at + 1), message, "take it out, or write it as an escape in a string"
    )


def _escape(case: _Case) -> Fault | None:
    if case.what.startswith("Unescaped"):
        start = case.text.rfind("\\", case.statement.start, case.at)
        end = min(start + 2, start + len(_rest(case.text, start)))
        message = f"`{shown(case.text[start:end])}` is not an escape of a string"
        advice = _plain(case.text, start)
        return Fault((start, max(end, start + 1)), message, advice)
    if case.what.startswith(("Invalid hex", "Escaped character")):
        start = case.text.rfind("\\", case.statement.start, case.at)
        end = min(case.at + 8, start + len(_rest(case.text, start)))
        token = re.match(r"\\[uU][0-9a-fA-F]*", case.text[start:end])
        stop = start + (token.end() if token else 2)
        message = f"`{shown(case.text[start:stop])}` names no character"
        advice = _plain(case.text, start)
        return Fault((start, stop), message, advice)
    return None


def _plain(text: str, at: int) -> str:
    """How to write the string around `at`, in which a backslash was probably meant as it stands."""
    line = text.rfind("\n", 0, at) + 1
    for found in re.finditer(r'"((?:[^"\\\n]|\\.)*)"', _rest(text, line)):
        is_path = re.match(r"[A-Za-z]:\\", found[1]) and "'" not in found[1]
        if found.start() <= at - line < found.end() and is_path:
            return f"write `'{shown(found[1])}'`: in single quotes `\\` is plain; or `/` in a path"
    return "in a path write `/`, or put the text in single quotes, where `\\` is plain"


def _unclosed_bracket(case: _Case) -> Fault | None:
    """An array or inline table that runs into the end or the next line, or lacks a comma."""
    opened = [at for at in case.opened if case.text[at] in "[{"]
    if case.statement.is_header or not opened or opened[-1] > case.at:
        return None
    start, closer = opened[-1], "]" if case.text[opened[-1]] == "[" else "}"
    line = case.text.rfind("\n", 0, case.at) + 1
    runs_on = case.at >= len(case.text) or (line > start and _PAIR_AHEAD.match(case.text, line))
    if runs_on:
        word = "array" if closer == "]" else "table"
        message = f"this {word} is never closed"
        resume = line - 1 if case.at < len(case.text) else -1
        return Fault((start, start + 1), message, f"end it with `{closer}`", resume=resume)
    if case.text[case.at] == "\n" and closer == "}":
        end = start + len(_rest(case.text, start).rstrip())
        advice = "close it with `}` on the same line, or use a [table] with a line for each key"
        return Fault((start, end), "an inline table must stay on one line", advice)
    if case.what in ("Unclosed array", "Unclosed inline table"):
        return _no_comma(case, closer)
    if closer == "}" and case.what.startswith("Invalid initial") and case.text[case.at] == "}":
        at = case.text.rfind(",", start, case.at)
        return Fault((at, at + 1), "a comma before `}` is not allowed", "take the comma out")
    return None


def _no_comma(case: _Case, closer: str) -> Fault:
    found = _unquoted(case, case.at)
    if found is not None and not re.match(r"[A-Za-z0-9_-]+\s*=", case.rest):
        return found
    end = case.at + max(1, len(_TOKEN.match(case.text, case.at)[0].rstrip()))  # type: ignore[index]
    advice = "put a comma between two entries"
    return Fault((case.at, end), f"expected `,` or `{closer}` here", advice)


def _bad_value(case: _Case) -> Fault | None:
    if case.what == "Invalid date or datetime":
        end = case.at + len(_token(case.text, case.at))
        return Fault((case.at, end), "there is no such date", "put it in quotes if it is text")
    if case.what != "Invalid value":
        return None
    token = _token(case.text, case.at)
    extent = (case.at, case.at + max(1, len(token)))
    name = shown(case.key) or "the key"
    if not token:
        if case.text[case.at : case.at + 1] in ("", "\n", "#"):
            head = case.text[: case.at].rstrip()
            equals = len(head) - 1
            advice = f"write `{name} = ...`, or take the line out"
            return Fault((equals, equals + 1), f"`{name}` has no value", advice)
        return Fault(extent, f"`{shown(case.text[case.at])}` cannot stand here")
    if token[0] == "=":
        return Fault(extent, "one `=` joins a key and its value", "take the other one out")
    message, advice = _about_token(token, name, bool(case.opened))
    return Fault(extent, message, advice)


def _about_token(token: str, name: str, nested: bool) -> tuple[str, str]:
    """Message and help for something that is no value."""
    begin = "" if nested else f"{name} = "
    word, text = token.lower(), shown(token)
    if word in _WORDS:
        return f"`{text}` is not a TOML value", f"write `{begin}{_WORDS[word]}`"
    if word in _NOTHING:
        return f"`{text}` is not a TOML value", "TOML has no null: leave the key out"
    if token[0] in _CURLY:
        bare = shown(token.strip(_CURLY))
        return "curly quotes do not make a string", f'write `{begin}"{bare}"`'
    if re.match(r"[+-]?\.\d", token):
        fixed = re.sub(r"^([+-]?)\.", r"\g<1>0.", token)
        return f"`{text}` is not a TOML number", f"write `{begin}{shown(fixed)}`"
    if not token.isprintable() or not re.search(r"\w", token):
        return f"`{text}` is not a TOML value", ""
    digits = unicodedata.normalize("NFKC", token)
    if digits != token and re.fullmatch(r"[+-]?[0-9]+(?:\.[0-9]+)?", digits):
        return f"`{text}` is not written in plain digits", f"write `{begin}{digits}`"
    if token[0] == "(":
        return "an array stands in square brackets", "write `[...]` instead of `(...)`"
    if nested and re.match(r"[A-Za-z_][\w-]*\s*=", token):
        return f"`{text}` can't stand in an array", "close the array before it, with `]`"
    if '"' in token or "\\" in token:
        return f"text must stand in quotes: `{text}`", f"write `{begin}'{text}'`"
    return f"text must stand in quotes: `{text}`", f'write `{begin}"{text}"`'


def _after_statement(case: _Case) -> Fault | None:
    if not case.what.startswith("Expected newline"):
        return None
    extent = (case.at, case.at + max(1, len(case.rest)))
    if case.rest.startswith("//"):
        return Fault(extent, "a comment begins with `#`, not `//`")
    if case.rest.startswith(";"):
        return Fault(extent, "a line does not end with `;`", "take it out")
    if case.statement.is_header:
        return Fault(extent, "expected nothing more after a header", "put it on a line of its own")
    if re.match(r"[A-Za-z0-9_-]+\s*=", case.rest):
        return Fault(extent, "two keys on one line", "put each key on a line of its own")
    found = _unquoted(case, case.at)
    return found or Fault(extent, "expected the end of the line here")


def _unquoted(case: _Case, at: int) -> Fault | None:
    """A value that goes on after what TOML read of it: `24 GiB`, `10%`, `012`, `'it's'`."""
    start = max(_value_start(case, at), case.statement.start)
    head, token = case.text[start:at].strip(), _token(case.text, start)
    nested = bool(case.opened)
    begin = "" if nested or not case.key else f"{shown(case.key)} = "
    extent = (start, start + len(token))
    if not head or not token or "\n" in case.text[start:at]:
        return None
    if head[0] in "\"'":
        if nested or not case.rest or case.rest[0] in "\"'":
            return None
        message = f"`{shown(case.rest)}` stands after the end of the string"
        advice = 'inside a string use the other kind of quotes, or `\\"`'
        return Fault((case.at, case.at + len(case.rest)), message, advice)
    if head[0] not in "+-0123456789":
        if re.fullmatch(r"(?:true|false|inf|nan)\w+", token):
            return Fault(extent, *_about_token(token, shown(case.key), nested))
        return None
    if nested and re.fullmatch(r"[+-]?[0-9][0-9.eE_+-]*(?:\s+[+-]?[0-9][0-9.eE_+-]*)+", token):
        return None  # two numbers that lack a comma
    fixed = _fixed_number(token)
    if fixed is not None:
        return Fault(extent, f"`{shown(token)}` is not a TOML number", f"write `{begin}{fixed}`")
    message = f"text must stand in quotes: `{shown(token)}`"
    return Fault(extent, message, f'write `{begin}"{shown(token)}"`')


def _fixed_number(token: str) -> str | None:
    """A number that TOML would take, for one that only other languages do."""
    if not _BAD_NUMBER.fullmatch(token) or len(token) > 40:
        return None
    fixed = re.sub(r"^([+-]?)0+(?=\d)", r"\1", token)
    fixed = re.sub(r"\.(?!\d)", ".0", fixed)
    fixed = re.sub(r"_+(?=_|\.|$|[eE])", "", fixed).replace("._", ".")
    return fixed if fixed != token else None


def _value_start(case: _Case, at: int) -> int:
    """Where the value that ends before `at` begins."""
    begin = at
    while begin > 0 and case.text[begin - 1] not in "\n=,[{":
        begin -= 1
    return begin + len(case.text[begin:at]) - len(case.text[begin:at].lstrip())


def _no_equals(case: _Case) -> Fault | None:
    if not case.what.startswith("Expected '='"):
        return None
    rest, start = case.rest, case.statement.start
    if case.opened:
        start = _value_start(case, case.at)
    name = shown(case.text[start : case.at].strip())
    extent = (case.at, case.at + max(1, len(rest[:1])))
    if rest.startswith(":"):
        value = shown(rest[1:].strip()) or "..."
        if re.fullmatch(r"[A-Za-z_][\w./ -]*", value) and value not in ("true", "false"):
            value = f'"{value}"'
        advice = f"write `{name} = {value}`"
        return Fault(extent, "a key and its value are joined by `=`, not `:`", advice)
    if rest[:1] in ("+", "-", "*", "?", "|") and rest[1:2] == "=":
        return Fault(
            (case.at, case.at + 2), f"`{shown(rest[:2])}` is not TOML", f"write `{name} = ...`"
        )
    if rest and not rest[0].isascii():
        return _odd_key(case.text, case.at)
    if "=" in rest:
        spaced = (case.text[start : case.at] + rest.partition("=")[0]).strip()
        before = re.search(r"[0-9]+,$", case.text[:start].rstrip())
        behind = re.match(r"[0-9][0-9eE+-]*(?=\s*[,}])", case.text[start:])
        if before and behind:  # a decimal comma in an inline table
            number = f"{before[0][:-1]}.{behind[0]}"
            extent = (start - len(before[0]), start + len(behind[0]))
            return Fault(extent, "a number has a decimal point, no comma", f"write `{number}`")
        advice = f"write `{shown(re.sub(r'[^A-Za-z0-9]+', '_', spaced))} = ...`"
        return Fault((start, start + len(spaced)), f"`{shown(spaced)}` is not one key", advice)
    line = (start, start + max(1, len(_rest(case.text, start).split("#")[0].rstrip())))
    message = f"`{shown(case.text[slice(*line)])}` is not a `key = value` line"
    return Fault(line, message, "add the value, or begin the line with `#` to make it a comment")


def _odd_key(text: str, at: int) -> Fault:
    char = text[at]
    name = unicodedata.name(char, "").lower() or f"U+{ord(char):04X}"
    message = f"a key without quotes cannot hold `{shown(char)}` ({name})"
    return Fault((at, at + 1), message, "a key is made of letters a-z, digits, `_` and `-`")


def _header_fault(case: _Case) -> Fault | None:
    start, line = case.statement.start, _rest(case.text, case.statement.start)
    if not case.statement.is_header:
        return None
    extent = (start, start + max(1, len(line.split("#")[0].rstrip())))
    name = shown(case.text[slice(*extent)].strip("[] \t"))
    if not name:
        return Fault(extent, "this header names no table", "write `[name]`")
    if case.text[case.at : case.at + 1] > "\x7f":
        return _odd_key(case.text, case.at)
    wanted = f"[[{name}]]" if line.startswith("[[") else f"[{name}]"
    return Fault(extent, "this header is not well formed", f"write `{wanted}`")


def _odd_start(case: _Case) -> Fault | None:
    if case.what not in ("Invalid statement", "Invalid initial character for a key part"):
        return None
    char = case.text[case.at : case.at + 1]
    extent = (case.at, case.at + 1)
    if not char or char == "\n":
        return Fault((max(case.at - 1, 0), case.at), "a key is missing here")
    if char == "=":
        return Fault(extent, "there is no key before `=`", "write `key = value`")
    if char == "{":
        return Fault(
            extent, "a recipe is TOML, not JSON", "write `key = value` lines under [tables]"
        )
    if char in "]}),":
        return Fault(
            extent, f"there is nothing here that `{char}` could close or part", "take it out"
        )
    if case.rest.startswith(("//", ";", "--", "/*", "%")):
        return Fault(extent, "a comment begins with `#`", "begin the line with `#`")
    if char > "\x7f":
        return _odd_key(case.text, case.at)
    return Fault(extent, f"`{shown(char)}` cannot begin a key", "write `key = value`")


def _anything(case: _Case) -> Fault:
    """What none of the others knows: the complaint as `tomllib` words it."""
    at = min(case.at, max(len(case.text) - 1, 0))
    what = case.what[:1].lower() + case.what[1:]
    return Fault((at, at + 1), shown(what, 70))


_EXPLANATIONS = (
    _duplicate,
    _unclosed_string,
    _bad_character,
    _escape,
    _unclosed_bracket,
    _bad_value,
    _after_statement,
    _no_equals,
    _header_fault,
    _odd_start,
    _anything,
)


def _token(text: str, at: int) -> str:
    """What stands at an offset, up to a comma, bracket, comment or the end of the line."""
    match = _TOKEN.match(text, at)
    return match[0].rstrip() if match else ""


def _rest(text: str, at: int) -> str:
    match = _REST.match(text, at)
    return match[0] if match else ""
