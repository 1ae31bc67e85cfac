"""Positions of keys and values, syntax errors, files, overrides and layers."""

import datetime
import math
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.diagnostics import Diagnostic, Span
from compiler.source import (
    MAX_BYTES,
    Merged,
    Source,
    TableRule,
    merge,
    parse_override,
    parse_overrides,
    parse_source,
    read_source,
)

VALID = [
    "",
    "\n\n",
    "# only a comment",
    "a = 1",
    "a=1",
    "  a  =  1  # tail",
    "\ta\t=\t1",
    "a = 1\r\nb = 2\r\n",
    "\ufeffa = 1",
    "a = -0\nb = +99\nc = 1_000",
    "a = 0xDEAD_beef\nb = 0o755\nc = 0b1101",
    "a = 3.14\nb = -0.01\nc = 5e+22\nd = 1e06\ne = -2E-2\nf = 6.626e-34",
    "a = inf\nb = -inf\nc = +inf\nd = nan\ne = +nan",
    "a = true\nb = false",
    "a = 1979-05-27T07:32:00Z",
    "a = 1979-05-27T00:32:00.999999-07:00",
    "a = 1979-05-27 07:32:00",
    "a = 1979-05-27T07:32:00",
    "a = 1979-05-27",
    "a = 07:32:00\nb = 00:32:00.999999",
    "a = [1979-05-27 07:32:00, 1979-05-27]",
    'a = ""',
    "a = ''",
    'a = "tab\\t quote\\" back\\\\ uni\\u00e9 \\U0001F600"',
    'a = "# no comment" # comment',
    "a = 'C:\\Users\\x'",
    'a = """\nRoses\nViolets"""',
    'a = """\\\n   The quick \\\n   fox"""',
    'a = """two quotes ""at"" once"""',
    'a = """ends with one""""',
    'a = """ends with two"""""',
    'a = """"starts with one"""',
    'a = """escaped \\""" still"""',
    "a = '''\nfirst\n second'''",
    "a = '''that's ''it'''''",
    "a = ''''one'''",
    "a = \"\"\"\"\"\"\nb = ''''''",
    'a = "\u00e9\u00e8 \u4f60\u597d \U0001f600"\nb = 2',
    "\"\u00e9\" = 1\n'\u4f60' = 2",
    '"" = 1',
    "'quoted \"inner\"' = 1",
    '"a.b" = 1\na.b = 2',
    '"tab\\tkey" = 1',
    "1234 = 1\n3.14 = 2",
    "a-b = 1\na_b = 2\n- = 3\n_ = 4",
    "a.b.c = 1\na.b.d = 2\na.e = 3",
    "a . b . 'c d' = 1",
    "true = 1\ninf = 2\n2001-02-03 = 4",
    "[a]\n[b]\n",
    "[a.b.c]\nx = 1\n[a]\ny = 2",
    "[ a . 'b' ]\nx = 1",
    "[a] # comment\nx = 1 # comment",
    "[a.b]\n[a.c]\n[a]\nd = 1",
    '["a.b"."c"]\nx = 1',
    "[a]\nb.c = 1\nb.d = 2\n[a.e]\nf = 3",
    "[[a]]\nx = 1\n[[a]]\nx = 2",
    "[[a]]\n[[a]]\n[[a]]",
    "[[a.b]]\nx = 1\n[a.b.c]\ny = 2\n[[a.b]]\n[a.b.c]\ny = 3",
    "[[a]]\n[[a.b]]\nx = 1\n[[a.b]]\nx = 2\n[[a]]\n[[a.b]]\nx = 3",
    "[[ a ]]\n'x' = 1",
    "a = []",
    "a = [1, 2, 3]",
    "a = [1, 2, 3,]",
    "a = [\n  1, # one\n  # two\n  2\n  ,\n]",
    "a = [[1, 2], ['x', \"y\"], []]",
    "a = [ { x = 1 }, { x = 2, y = [3] } ]",
    'a = ["#", ",", "]", "}"]',
    "a = {}",
    "a = { }",
    "a = { x = 1, y = 'z' }",
    "a = { b.c = 1, b.d = 2, 'e f' = 3 }",
    "a = { b = { c = { d = 1 } } }",
    "a = {x=1,y=[1,2],z={}}",
    "a = [\n  '''x\n  y''',\n  \"\"\"\nz\"\"\",\n]",
    "a = 1\n\n\n[b]\n\n\nc = 2\n",
    'a = "x"#y',
    "fruit.apple.smooth = true\nfruit.orange = 2\n[other]",
    "[fruit]\napple.color = 1\napple.taste.sweet = true\n[fruit.apple.texture]\nsmooth = true",
    "a = '\u2028\u0085'\nb = 1",
    "a = 9223372036854775807\nb = -9223372036854775808",
]


def parsed(text: str) -> Source:
    source, diagnostics = parse_source(text, "t.toml")
    assert source is not None, diagnostics
    return source


def faults(text: str) -> list[Diagnostic]:
    source, diagnostics = parse_source(text, "t.toml")
    assert source is None
    assert diagnostics
    return diagnostics


def at(span: Span | None) -> str:
    assert span is not None
    return f"{span.line}:{span.column}-{span.end_line}:{span.end_column}"


def piece(text: str, span: Span) -> str:
    """What a span covers, found independently of `Source.snippet`."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    return text[
        starts[span.line - 1] + span.column - 1 : starts[span.end_line - 1] + span.end_column - 1
    ]


def same(left: Any, right: Any) -> bool:
    """Equal, also for NaN."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return type(left) is type(right) and left == right


def check_all_spans(source: Source) -> None:
    """Each value's span reads as that value; each table and key of the data has a place."""

    def walk(value: Any, path: tuple[str | int, ...]) -> None:
        if path:
            assert source.span(path, "value").file == source.name
            placed = path in source.value_spans or path in source.table_spans
            assert placed or isinstance(value, dict | list)
            assert isinstance(path[-1], int) or path in source.key_spans
        if path in source.value_spans:
            text = piece(source.text, source.value_spans[path])
            assert same(tomllib.loads(f"v = {text}")["v"], value)
            assert text == source.snippet(path)
        if path in source.key_spans and isinstance(path[-1], str):
            text = piece(source.text, source.key_spans[path])
            assert tomllib.loads(f"{text} = 1") == {path[-1]: 1}
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(item, (*path, key))

    walk(source.data, ())
    known = (*source.key_spans, *source.value_spans, *source.table_spans)
    for path in known:
        value: Any = source.data
        for part in path:
            value = value[part]


@pytest.mark.parametrize("text", VALID)
def test_every_value_and_key_has_its_place(text: str) -> None:
    source = parsed(text)
    assert same(source.data, tomllib.loads(text.removeprefix("\ufeff")))
    check_all_spans(source)


def test_there_are_enough_documents() -> None:
    assert len(VALID) >= 60


@pytest.mark.parametrize(
    ("text", "path", "of", "expected"),
    [
        ("a = 1", ("a",), "key", "1:1-1:2"),
        ("a = 1", ("a",), "value", "1:5-1:6"),
        ("\r\n\r\nab = 'x' # c\r\n", ("ab",), "value", "3:6-3:9"),
        ("\ufeffa = 1", ("a",), "key", "1:1-1:2"),
        ('"\u4f60\u597d" = "\U0001f600"', ("\u4f60\u597d",), "value", "1:8-1:11"),
        ("a.b . c = 1", ("a", "b"), "key", "1:3-1:4"),
        ("a.b . c = 1", ("a", "b", "c"), "key", "1:7-1:8"),
        ("[x]\n[a.b]\nc = 2", ("a", "b"), "key", "2:4-2:5"),
        ("[x]\n[a.b]\nc = 2", ("a", "b"), "table", "2:1-2:6"),
        ("[x]\n[a.b]\nc = 2", ("a",), "table", "2:2-2:3"),
        ("[a.b]\n[a]", ("a",), "key", "2:2-2:3"),
        ("[[s]]\n[[s]]\np = 1", ("s", 1), "table", "2:1-2:6"),
        ("[[s]]\n[[s]]\np = 1", ("s",), "key", "2:3-2:4"),
        ("[[s]]\n[[s]]\np = 1", ("s", 1, "p"), "value", "3:5-3:6"),
        ("[[s]]\n[s.t]\nu = 1", ("s", 0, "t", "u"), "key", "3:1-3:2"),
        ("a = [\n 1,\n [2, 33],\n]", ("a", 1, 1), "value", "3:6-3:8"),
        ("a = [\n 1,\n [2, 33],\n]", ("a",), "value", "1:5-4:2"),
        ("a = { b = 1, c.d = 'x' }", ("a", "c", "d"), "key", "1:16-1:17"),
        ("a = { b = 1, c.d = 'x' }", ("a",), "table", "1:5-1:25"),
        ('a = """\nx\n"""\nb = 1', ("a",), "value", "1:5-3:4"),
        ('a = """\nx\n"""\nb = 1', ("b",), "value", "4:5-4:6"),
        ("a = 1979-05-27 07:32:00 # t", ("a",), "value", "1:5-1:24"),
        ("[a]\nb = 1", ("a", "nope"), "value", "1:1-1:4"),
        ("[a]\nb = 1", ("a", "b", "nope", 3), "key", "2:5-2:6"),
        ("[a]\nb = 1", ("nope",), "key", "1:1-1:1"),
        ("[a]\nb = 1", (), "table", "1:1-1:1"),
    ],
)
def test_positions(text: str, path: tuple[str | int, ...], of: Any, expected: str) -> None:
    assert at(parsed(text).span(path, of)) == expected


@pytest.mark.parametrize(
    ("text", "place", "message", "advice"),
    [
        ("a = flux", "1:5-1:9", "text must stand in quotes: `flux`", 'write `a = "flux"`'),
        ("a = 24 GiB", "1:5-1:11", "text must stand in quotes: `24 GiB`", 'write `a = "24 GiB"`'),
        ("a = 10%", "1:5-1:8", "text must stand in quotes: `10%`", 'write `a = "10%"`'),
        ("a = True", "1:5-1:9", "`True` is not a TOML value", "write `a = true`"),
        ("a = no # x", "1:5-1:7", "`no` is not a TOML value", "write `a = false`"),
        ("a = None", "1:5-1:9", "`None` is not a TOML value",
         "TOML has no null: leave the key out"),
        ("a = .5", "1:5-1:7", "`.5` is not a TOML number", "write `a = 0.5`"),
        ("a = 5.", "1:5-1:7", "`5.` is not a TOML number", "write `a = 5.0`"),
        ("a = 012", "1:5-1:8", "`012` is not a TOML number", "write `a = 12`"),
        ("a = 1.e-4", "1:5-1:10", "`1.e-4` is not a TOML number", "write `a = 1.0e-4`"),
        ("a =", "1:3-1:4", "`a` has no value", "write `a = ...`, or take the line out"),
        ("a = # later", "1:3-1:4", "`a` has no value", "write `a = ...`, or take the line out"),
        ("a: 3", "1:2-1:3", "a key and its value are joined by `=`, not `:`", "write `a = 3`"),
        ('a = "x', "1:5-1:7", "this string is not closed", 'end it with `"` on the same line'),
        ("a = 'x\nb = 1", "1:5-1:7", "this string is not closed",
         "end it with `'` on the same line"),
        ('a = """x\nb = 1', "1:5-1:8", "this string is never closed", 'end it with `"""`'),
        ("a = '''x\nb = 1", "1:5-1:8", "this string is never closed", "end it with `'''`"),
        ("a = [1,\nb = 2", "1:5-1:6", "this array is never closed", "end it with `]`"),
        ("a = [1, 2", "1:5-1:6", "this array is never closed", "end it with `]`"),
        ("a = [[1], [2\n[b]", "1:11-1:12", "this array is never closed", "end it with `]`"),
        ('a = ["x" "y"]', "1:10-1:13", "expected `,` or `]` here",
         "put a comma between two entries"),
        ("a = [1 2]", "1:8-1:9", "expected `,` or `]` here", "put a comma between two entries"),
        ("a = { b = 1 c = 2 }", "1:13-1:18", "expected `,` or `}` here",
         "put a comma between two entries"),
        ("a = 1 b = 2", "1:7-1:12", "two keys on one line", "put each key on a line of its own"),
        ("a = 1 // x", "1:7-1:11", "a comment begins with `#`, not `//`", ""),
        ("a = 1;", "1:6-1:7", "a line does not end with `;`", "take it out"),
        ("a b = 1", "1:1-1:4", "`a b` is not one key", "write `a_b = ...`"),
        ("hello", "1:1-1:6", "`hello` is not a `key = value` line",
         "add the value, or begin the line with `#` to make it a comment"),
        ("= 3", "1:1-1:2", "there is no key before `=`", "write `key = value`"),
        ("{", "1:1-1:2", "a recipe is TOML, not JSON", "write `key = value` lines under [tables]"),
        ("]", "1:1-1:2", "there is nothing here that `]` could close or part", "take it out"),
        ("[a\nb = 1", "1:1-1:3", "this header is not well formed", "write `[a]`"),
        ("[[a]\nb = 1", "1:1-1:5", "this header is not well formed", "write `[[a]]`"),
        ("[]", "1:1-1:3", "this header names no table", "write `[name]`"),
        ("[a] b = 1", "1:5-1:10", "expected nothing more after a header",
         "put it on a line of its own"),
        ("a = \u201cx\u201d", "1:5-1:8", "curly quotes do not make a string", 'write `a = "x"`'),
        ("\u00e9 = 1", "1:1-1:2",
         "a key without quotes cannot hold `\u00e9` (latin small letter e with acute)",
         "a key is made of letters a-z, digits, `_` and `-`"),
        ("a\u00a0= 1", "1:2-1:3", "a key without quotes cannot hold `\u00a0` (no-break space)",
         "a key is made of letters a-z, digits, `_` and `-`"),
        (r'a = "C:\Users"', "1:8-1:10", r"`\U` names no character",
         r"write `'C:\Users'`: in single quotes `\` is plain; or `/` in a path"),
        (r'a = "C:\data"', "1:8-1:10", r"`\d` is not an escape of a string",
         r"write `'C:\data'`: in single quotes `\` is plain; or `/` in a path"),
        ('a = "\\ud800"', "1:6-1:12", r"`\ud800` names no character",
         r"in a path write `/`, or put the text in single quotes, where `\` is plain"),
        ('a = "x\x00"', "1:7-1:8", "the control character U+0000 cannot stand in TOML",
         "take it out, or write it as an escape in a string"),
        ("a = 1 # \x1b", "1:9-1:10", "the control character U+001B cannot stand in TOML",
         "take it out, or write it as an escape in a string"),
        ("a = 2024-02-30", "1:5-1:15", "there is no such date", "put it in quotes if it is text"),
    ],
)  # fmt: skip
def test_syntax_errors(text: str, place: str, message: str, advice: str) -> None:
    (fault,) = faults(text)
    assert (at(fault.span), fault.message, fault.help) == (place, message, advice)
    assert fault.code == "invalid-toml"
    assert fault.excerpt == text.split("\n")[0]


@pytest.mark.parametrize(
    ("text", "place", "message", "first"),
    [
        ("a = 1\nb = 2\na = 3", "3:1-3:2", "duplicate key `a`", "t.toml:1:1"),
        ("[t]\na = 1\n'a' = 3", "3:1-3:4", "duplicate key `'a'`", "t.toml:2:1"),
        ("x = { a = 1, b = 2, a = 3 }", "1:21-1:22", "duplicate key `a`", "t.toml:1:7"),
        ("a.b = 1\na.b = 2", "2:1-2:4", "duplicate key `a.b`", "t.toml:1:3"),
        ("[t]\n[u]\n[t]", "3:2-3:3", "duplicate table [t]", "t.toml:1:2"),
        ("t = 1\n[t]", "2:2-2:3", "`t` is already given as a value, so `t` cannot add to it",
         "t.toml:1:1"),
        ("t = 1\n[t.u]", "2:2-2:5", "`t` is already given as a value, so `t.u` cannot add to it",
         "t.toml:1:1"),
        ("[t]\na = 1\na.b = 2", "3:1-3:4",
         "`a` is already given as a value, so `a.b` cannot add to it", "t.toml:2:1"),
        ("a = [1]\n[[a]]", "2:3-2:4", "`a` is already given as a value, so `a` cannot add to it",
         "t.toml:1:1"),
        ("a = { b = 1 }\na.c = 2", "2:1-2:4",
         "`a` is already given as a value, so `a.c` cannot add to it", "t.toml:1:1"),
    ],
)  # fmt: skip
def test_duplicates_name_both_places(text: str, place: str, message: str, first: str) -> None:
    (fault,) = faults(text)
    assert (fault.code, at(fault.span), fault.message) == ("duplicate-key", place, message)
    assert fault.notes == (f"first given at {first}",)


def test_many_faults_are_reported_at_once() -> None:
    text = "a = flux\nb = 1\nb = 2\n[t\nb = 3\nc = True\n[u]\nc = 1\nd = 'x\nc = 2\n"
    assert [(fault.span.line, fault.code) for fault in faults(text) if fault.span] == [
        (1, "invalid-toml"),
        (3, "duplicate-key"),
        (4, "invalid-toml"),
        (6, "invalid-toml"),
        (9, "invalid-toml"),
        (10, "duplicate-key"),
    ]


def test_a_broken_header_is_not_taken_for_the_table_above() -> None:
    (fault,) = faults("[a]\nx = 1\n[b\nx = 2\n")
    assert at(fault.span) == "3:1-3:3"


@pytest.mark.parametrize(
    ("text", "code", "place"),
    [
        ("a = 9223372036854775808", "out-of-range", "1:5-1:24"),
        ("a = [1, 0xffffffffffffffffff]", "out-of-range", "1:9-1:29"),
        ("a = " + "9" * 5000, "out-of-range", "1:5-1:5005"),
        ("a = " + "[" * 40 + "]" * 40, "nested-too-deep", "1:37-1:38"),
        ("a = " + "[" * 100_000, "nested-too-deep", "1:37-1:38"),
        ("a = " + "{a=" * 100_000, "nested-too-deep", "1:100-1:101"),
        (".".join("a" * 40) + " = 1", "nested-too-deep", "1:66-1:67"),
        ("a = [" + "1," * 20_001 + "]", "file-too-large", "1:40006-1:40007"),
        ("[[a]]\n" * 20_001, "file-too-large", "20001:1-20001:2"),
        ("[" + ".".join("a" * 100_000) + "]", "nested-too-deep", "1:67-1:68"),
    ],
)
def test_limits(text: str, code: str, place: str) -> None:
    (fault,) = faults(text)
    assert (fault.code, at(fault.span)) == (code, place)


def test_files(tmp_path: Path) -> None:
    def code(name: str, content: bytes | None = None) -> Diagnostic:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        source, diagnostics = read_source(path, name)
        assert source is None
        (found,) = diagnostics
        return found

    good = tmp_path / "good.toml"
    good.write_bytes(b"\xef\xbb\xbfa = 1\r\n")
    source, diagnostics = read_source(good, "good.toml")
    assert source is not None
    assert not diagnostics
    assert source.text == "a = 1\n"
    missing = code("goood.toml")
    assert (missing.code, missing.message) == ("no-such-file", "`goood.toml` does not exist")
    assert missing.help.endswith("good.toml`?")
    assert code("good.toml/x.toml").code == "no-such-file"
    assert code("x" * 5000).code == "unreadable-file"
    assert code("a\0b").code == "unreadable-file"
    assert code("", None).message == "`` is a folder, not a recipe"
    assert code("large.toml", b"#" * (MAX_BYTES + 1)).message == "`large.toml` is larger than 8 MiB"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        found = code("wide.toml", "a = 'some text'\n".encode(encoding))
        assert found.code == "wrong-encoding"
        assert "is UTF-32" in found.message or "is UTF-16" in found.message
    latin = code("latin.toml", "a = 1\nb = 'caf\u00e9'\n".encode("latin-1"))
    assert (latin.message, at(latin.span)) == ("byte 0xe9 is not UTF-8", "2:9-2:10")
    macintosh = code("cr.toml", b"a = 1\rb = 2\r")
    assert macintosh.code == "wrong-encoding" and "carriage returns alone" in macintosh.message
    nul = code("nul.toml", b"a = 1\nb = 'x\0'\n")
    assert (nul.code, at(nul.span)) == ("wrong-encoding", "2:7-2:8")
    os.mkfifo(tmp_path / "pipe.toml")
    assert code("pipe.toml").code == "not-a-file"


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.toml"
    path.write_text("a = 1")
    monkeypatch.setattr(Path, "open", refuse)
    (found,) = read_source(path, "a.toml")[1]
    assert found.code == "unreadable-file"
    assert found.message == "`a.toml` cannot be read: permission denied"


@pytest.mark.parametrize(
    ("argument", "data", "path", "value_at"),
    [
        ("a=1", {"a": 1}, ("a",), "1:3-1:4"),
        ("a.b.c=1e-4", {"a": {"b": {"c": 1e-4}}}, ("a", "b", "c"), "1:7-1:11"),
        ("model.base=foo/bar", {"model": {"base": "foo/bar"}}, ("model", "base"), "1:12-1:19"),
        ("a = 24 GiB ", {"a": "24 GiB"}, ("a",), "1:5-1:11"),
        ("a=10%", {"a": "10%"}, ("a",), "1:3-1:6"),
        ("a=C:\\data\\x", {"a": "C:\\data\\x"}, ("a",), "1:3-1:12"),
        ("a='x'", {"a": "x"}, ("a",), "1:3-1:6"),
        ('a=""', {"a": ""}, ("a",), "1:3-1:5"),
        ("a=true", {"a": True}, ("a",), "1:3-1:7"),
        ("a=it's", {"a": "it's"}, ("a",), "1:3-1:7"),
        ("a=x=y", {"a": "x=y"}, ("a",), "1:3-1:6"),
        ('"a b".c=[1, {d=2}]', {"a b": {"c": [1, {"d": 2}]}}, ("a b", "c", 1, "d"), "1:16-1:17"),
        ("s[0].r=3", {"s": {0: {"r": 3}}}, ("s", 0, "r"), "1:8-1:9"),
        ("s.0.r=3", {"s": {"0": {"r": 3}}}, ("s", "0", "r"), "1:7-1:8"),
        ("a=2024-01-01", {"a": datetime.date(2024, 1, 1)}, ("a",), "1:3-1:13"),
    ],
)
def test_overrides(
    argument: str, data: dict[str, Any], path: tuple[str | int, ...], value_at: str
) -> None:
    source, diagnostics = parse_override(argument)
    assert source is not None, diagnostics
    assert (source.data, source.name, source.kind) == (data, "--set", "override")
    assert at(source.span(path)) == value_at


@pytest.mark.parametrize(
    ("argument", "place", "message"),
    [
        ("", "1:1-1:2", "an override needs `=` and a value"),
        ("a", "1:1-1:2", "an override needs `=` and a value"),
        ("=1", "1:1-1:2", "there is no key before `=`"),
        ("a..b=1", "1:1-1:5", "`a..b` is not a key"),
        ("a b=1", "1:1-1:4", "`a b` is not a key"),
        ("a=", "1:2-1:3", "this override has no value"),
        ("a=[1,", "1:3-1:4", "this array is never closed"),
        ("a='x", "1:3-1:5", "this string is not closed"),
        ("a=1\nb=2", "1:3-1:4", "this is more than one value"),
        ("a=\x1b[0m", "1:3-1:4", ""),
        ("a=" + "[" * 50, "1:35-1:36", "tables and arrays are nested deeper than 32 levels"),
        ("a=" + "9" * 5000, "1:3-1:5003", "this number does not fit in 64 bits"),
    ],
)
def test_bad_overrides(argument: str, place: str, message: str) -> None:
    source, (found,) = parse_override(argument)
    assert source is None
    assert found.span is not None
    assert found.span.file == "--set"
    if message:
        assert (at(found.span), found.message) == (place, message)


def test_several_overrides_are_lines_of_one_file() -> None:
    sources, diagnostics = parse_overrides(["a=1", "b", "c.d=x y"])
    assert [source.data for source in sources] == [{"a": 1}, {"c": {"d": "x y"}}]
    assert [at(found.span) for found in diagnostics] == ["2:1-2:2"]
    assert at(sources[1].span(("c", "d"))) == "3:5-3:8"
    assert sources[0].texts == {"--set": "a=1\nb\nc.d=x y"}


def layered(*layers: tuple[str, Any, str], rules: Any = None) -> tuple[Merged, list[Diagnostic]]:
    sources = []
    for name, kind, text in layers:
        source, diagnostics = parse_source(text, name, kind)
        assert source is not None, diagnostics
        sources.append(source)
    return merge(sources, rules)


def test_layers_merge_tables_and_replace_the_rest() -> None:
    merged, diagnostics = layered(
        (
            "preset:p",
            "preset",
            "a = 1\n[t]\nb = 2\nc = [1, 2]\n[t.u]\nv = 1\n[[s]]\nx = 1\n[[s]]\n",
        ),
        ("r.toml", "recipe", "[t]\nc = [3]\nd = 4\n[t.u]\nw = 2\n[[s]]\ny = 5\n"),
    )
    assert not diagnostics
    assert merged.data == {
        "a": 1,
        "t": {"b": 2, "c": [3], "d": 4, "u": {"v": 1, "w": 2}},
        "s": [{"y": 5}],
    }
    assert merged.where(("a",)) == "preset:p:1"
    assert merged.where(("t", "b")) == "preset:p:3"
    assert merged.where(("t", "c", 0)) == "r.toml:2"
    assert merged.where(("t",)) == "r.toml:1"
    assert merged.where(("s", 0, "y")) == "r.toml:7"
    assert at(merged.span(("s", 0, "nope"), "table")) == "6:1-6:6"
    assert merged.origin(("t", "u", "v")).kind == "preset"
    assert merged.snippet(("t", "c")) == "[3]"


def test_merging_leaves_the_sources_as_they_were() -> None:
    base, _ = parse_source("[t]\na = [{ b = 1 }]", "r.toml")
    over, _ = parse_overrides(["t.a[0].b=2", "t.c=3"])
    assert base is not None
    merged, _ = merge([base, *over])
    assert merged.data == {"t": {"a": [{"b": 2}], "c": 3}}
    assert base.data == {"t": {"a": [{"b": 1}]}}


def test_overrides_reach_into_arrays() -> None:
    base, _ = parse_source("[[d.s]]\nr = 1\n[[d.s]]\nr = 2\n[n]\n512 = 1", "r.toml")
    over, _ = parse_overrides(["d.s.0.r=7", "d.s[1].r=8", "n.512=4", "n.0=1", "d.s.1.q.w=9"])
    assert base is not None
    merged, diagnostics = merge([base, *over])
    assert not diagnostics
    assert merged.data == {
        "d": {"s": [{"r": 7}, {"r": 8, "q": {"w": 9}}]},
        "n": {"512": 4, "0": 1},
    }
    assert at(merged.span(("d", "s", 0, "r"))) == "1:9-1:10"
    assert merged.where(("d", "s", 1, "r")) == "--set"
    assert merged.texts["--set"].count("\n") == 4
    assert at(merged.span(("d", "s", 0), "table")) == "1:1-1:8"


@pytest.mark.parametrize(
    ("argument", "message", "place"),
    [
        ("s.2.r=1", "`s` has no entry `2`", "1:3-1:4"),
        ("s[2]=1", "`s` has no entry `2`", "1:2-1:5"),
        ("s.x=1", "`s` has no entry `x`", "1:3-1:4"),
        ("t[0]=1", "`t` is not an array", "1:2-1:5"),
        ("new[0].a=1", "`new` is not an array", "1:4-1:7"),
    ],
)
def test_overrides_of_nothing(argument: str, message: str, place: str) -> None:
    base, _ = parse_source("[[s]]\nr = 1\n[[s]]\n[t]\n", "r.toml")
    over, _ = parse_override(argument)
    assert base is not None
    assert over is not None
    merged, (found,) = merge([base, over])
    assert (found.code, found.message, at(found.span)) == ("no-such-entry", message, place)
    assert merged.data == base.data


@pytest.mark.parametrize(
    ("argument", "name", "place"),
    [
        ("t={}", "t", "1:1-1:2"),
        ("t.u = {}", "t.u", "1:3-1:4"),
        ("t={ u = {}, b = 2 }", "t.u", "1:5-1:6"),
        ("s[0]={}", "s[0]", "1:2-1:5"),
    ],
)
def test_an_empty_table_over_another_is_refused(argument: str, name: str, place: str) -> None:
    base, _ = parse_source("[[s]]\nr = 1\n[t]\na = 1\n[t.u]\nb = 2\n[e]\n", "r.toml")
    over, _ = parse_override(argument)
    assert base is not None
    assert over is not None
    _, (found,) = merge([base, over])
    assert (found.code, at(found.span)) == ("no-effect", place)
    assert f"changes nothing in `{name}`" in found.message and f"`{name}.KEY=...`" in found.help


@pytest.mark.parametrize("argument", ["e={}", "new={}", "t.new={}"])
def test_an_empty_table_where_there_is_none(argument: str) -> None:
    base, _ = parse_source("[t]\na = 1\n[e]\n", "r.toml")
    over, _ = parse_override(argument)
    assert base is not None
    assert over is not None
    assert merge([base, over])[1] == []


def test_shorthand_and_tags_of_layers() -> None:
    rules = {("o",): TableRule(tag="name", shorthand="name")}
    preset = ("p", "preset", 'o = "adamw"')
    merged, _ = layered(preset, ("r", "recipe", "[o]\nlr = 1"), rules=rules)
    assert merged.data == {"o": {"name": "adamw", "lr": 1}}
    assert merged.where(("o", "name")) == "p:1"
    merged, _ = layered(
        ("p", "preset", 'o = { name = "adamw", beta = 1 }'),
        ("r", "recipe", '[o]\nname = "lion"'),
        rules=rules,
    )
    assert merged.data == {"o": {"name": "lion"}}
    assert merged.where(("o",)) == "r:1"


# generated documents

bare_keys = st.text("abcXYZ019_-", min_size=1, max_size=4)
any_text = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\t\n\"'\\#"), max_size=8
)


def basic(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    return '"' + "".join(escapes.get(char, char) for char in text) + '"'


@st.composite
def key_parts(draw: st.DrawFn) -> tuple[str, str]:
    """A key and one of its spellings."""
    name = draw(st.one_of(bare_keys, any_text))
    spellings = [basic(name)]
    if name and all(char.isascii() and (char.isalnum() or char in "_-") for char in name):
        spellings.append(name)
    if "'" not in name and "\n" not in name:
        spellings.append(f"'{name}'")
    return name, draw(st.sampled_from(spellings))


@st.composite
def string_values(draw: st.DrawFn) -> str:
    text = draw(any_text)
    spellings = [basic(text), '"""' + basic(text)[1:-1] + '"""']
    if "'" not in text:
        spellings.append(f"'''{text}'''")
        if "\n" not in text:
            spellings.append(f"'{text}'")
    return draw(st.sampled_from(spellings))


numbers = st.one_of(
    st.integers(-(2**63), 2**63 - 1).map(str),
    st.integers(0, 2**32).map(hex),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["inf", "-inf", "nan", "1_000", "1e5", "true", "false"]),
    st.datetimes(min_value=datetime.datetime(1000, 1, 1)).map(datetime.datetime.isoformat),
    st.dates(min_value=datetime.date(1000, 1, 1)).map(str),
)
blanks = st.sampled_from(["", " ", "  ", "\t"])
wide_blanks = st.sampled_from(["", " ", "\n", " # note ]},\n", "\n\n\t"])


@st.composite
def array_values(draw: st.DrawFn, inner: st.SearchStrategy[str]) -> str:
    items = draw(st.lists(inner, max_size=3))
    parts = [draw(wide_blanks) + item + draw(wide_blanks) for item in items]
    tail = "," if items and draw(st.booleans()) else ""
    return "[" + ",".join(parts) + tail + draw(wide_blanks) + "]"


@st.composite
def inline_tables(draw: st.DrawFn, inner: st.SearchStrategy[str]) -> str:
    keys = draw(st.lists(key_parts(), max_size=3, unique_by=lambda part: part[0]))
    pairs = [f"{spelled}{draw(blanks)}={draw(blanks)}{draw(inner)}" for _, spelled in keys]
    return "{" + draw(blanks) + ", ".join(pairs) + draw(blanks) + "}"


values: st.SearchStrategy[str] = st.recursive(
    st.one_of(string_values(), numbers),
    lambda inner: st.one_of(array_values(inner), inline_tables(inner)),
    max_leaves=6,
)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """TOML text: pairs (dotted or not), tables, arrays of tables, comments, blank lines."""
    lines = []
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(["pair", "pair", "pair", "table", "list", "comment"]))
        parts = draw(st.lists(key_parts(), min_size=1, max_size=3))
        dot = draw(st.sampled_from([".", " . "]))
        key = dot.join(spelled for _, spelled in parts)
        lines.append(
            {
                "pair": f"{draw(blanks)}{key}{draw(blanks)}={draw(blanks)}{draw(values)} # c = 'd",
                "table": f"[{draw(blanks)}{key}{draw(blanks)}]",
                "list": f"[[{key}]]",
                "comment": f"# {key}".replace("\n", ""),
            }[kind]
        )
    return draw(st.sampled_from(["\n", "\r\n"])).join(lines)


@settings(max_examples=100, deadline=None)
@given(documents())
def test_generated_documents(text: str) -> None:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # a key drawn twice
        assert faults(text)
        return
    source = parsed(text)
    assert same(source.data, data)
    check_all_spans(source)
