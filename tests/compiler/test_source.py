"""Positions of keys and values, syntax errors, and files."""

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from compiler.diagnostics import Diagnostic
from compiler.source import (
    MAX_BYTES,
    read_source,
)
from tests.compiler.toml_texts import at, check_all_spans, faults, parsed, same

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
