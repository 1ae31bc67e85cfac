"""The exact text of diagnostics, their JSON and order, and names guessed."""

import json

import attrs
import pytest

from compiler.diagnostics import (
    Diagnostic,
    Span,
    nearest,
    render,
    safe,
    shown,
    sort_diagnostics,
    summary,
    to_json,
)


def span(line: int, start: int, end: int, file: str = "bad.toml", end_line: int = 0) -> Span:
    return Span(file=file, line=line, column=start, end_line=end_line or line, end_column=end)


def test_help_below_the_carets() -> None:
    found = Diagnostic(
        code="unknown-value",
        message="unknown value `flux`",
        span=span(5, 10, 16),
        help="did you mean `flux1`?",
    )
    assert render(found, {"bad.toml": '\n\n\n\nfamily = "flux"\n'}) == (
        "error[unknown-value]: unknown value `flux`\n"
        " --> bad.toml:5:10\n"
        "  |\n"
        '5 | family = "flux"\n'
        "  |          ^^^^^^\n"
        "  |\n"
        "help: did you mean `flux1`?"
    )


def test_gutter_grows_with_the_line_number() -> None:
    found = Diagnostic(
        code="out-of-range",
        message="-1 is out of range",
        span=span(12, 9, 11),
        label="must be > 0",
    )
    assert render(found, {"bad.toml": "\n" * 11 + "alpha = -1"}) == (
        "error[out-of-range]: -1 is out of range\n"
        "  --> bad.toml:12:9\n"
        "   |\n"
        "12 | alpha = -1\n"
        "   |         ^^ must be > 0\n"
        "   |"
    )


def test_label_of_a_design_example() -> None:
    text = "\n" * 11 + 'targets = ["attn", "ff_context.*"]'
    found = Diagnostic(
        code="no-such-layer",
        message="`ff_context.*` matches no linear layer of sdxl",
        span=span(12, 20, 34, "recipes/sdxl-style.toml"),
        label="0 of 743 linears",
        help="sdxl has `attn`, `ff`, `proj_in`, `proj_out`",
    )
    assert render(found, {"recipes/sdxl-style.toml": text}) == (
        "error[no-such-layer]: `ff_context.*` matches no linear layer of sdxl\n"
        "  --> recipes/sdxl-style.toml:12:20\n"
        "   |\n"
        '12 | targets = ["attn", "ff_context.*"]\n'
        "   |                    ^^^^^^^^^^^^^^ 0 of 743 linears\n"
        "   |\n"
        "help: sdxl has `attn`, `ff`, `proj_in`, `proj_out`"
    )


def test_without_place_or_text() -> None:
    found = Diagnostic(code="a-b", severity="warning", message="so", help="do")
    assert render(found, {}) == "warning[a-b]: so\nhelp: do"
    placed = Diagnostic(code="a-b", message="so", span=span(1, 2, 3))
    assert render(placed, {}) == "error[a-b]: so\n --> bad.toml:1:2"
    excerpt = Diagnostic(code="a-b", message="so", span=span(1, 2, 3), excerpt="abc")
    assert render(excerpt, {}).endswith("1 | abc\n  |  ^\n  |")
    assert render(excerpt, {"bad.toml": "xyz"}).endswith("1 | xyz\n  |  ^\n  |")


def test_notes_and_long_help_wrap() -> None:
    found = Diagnostic(
        code="c",
        severity="note",
        message="word " * 20 + "end",
        notes=("first given at bad.toml:1:1",),
        help="a " * 45 + "b\n[adapter]\n  rank = 16",
    )
    assert render(found, {}) == (
        "note[c]: " + ("word " * 14).rstrip() + "\n"
        "  word word word word word word end\n"
        "note: first given at bad.toml:1:1\n"
        "help: " + ("a " * 37).rstrip() + "\n"
        "      a a a a a a a a b\n"
        "      [adapter]\n"
        "        rank = 16"
    )


@pytest.mark.parametrize(
    ("line", "start", "end", "shown_line", "carets"),
    [
        ("a = 1", 5, 6, "a = 1", "    ^"),
        ("\ta\t= 1", 4, 5, "    a   = 1", "        ^"),
        ("\u4f60\u597d = 1", 6, 7, "\u4f60\u597d = 1", "       ^"),
        ('"\u4f60\u597d" = 1', 1, 5, '"\u4f60\u597d" = 1', "^^^^^^"),
        ("e\u0301x = 1", 3, 4, "e\u0301x = 1", " ^"),
        ("a\x1b = 1", 2, 3, "a\\x1b = 1", " ^^^^"),
        ("a\u202e\ud800 = 1", 3, 4, "a\\u202e\\ud800 = 1", "       ^^^^^^"),
        ("a = 1", 9, 12, "a = 1", "     ^"),
        ("a = 1", 3, 3, "a = 1", "  ^"),
    ],
)
def test_alignment(line: str, start: int, end: int, shown_line: str, carets: str) -> None:
    found = Diagnostic(code="c", message="m", span=span(1, start, end))
    lines = render(found, {"bad.toml": line}).split("\n")
    assert lines[3] == f"1 | {shown_line}"
    assert lines[4] == f"  | {carets}"


def test_several_lines_show_the_first() -> None:
    found = Diagnostic(code="c", message="m", span=span(1, 5, 2, end_line=3))
    assert render(found, {"bad.toml": "a = [\n1\n]"}).split("\n")[3:5] == ["1 | a = [", "  |     ^"]


@pytest.mark.parametrize(
    ("line", "start", "end", "expected"),
    [
        ("a" * 200, 1, 3, ["1 | " + "a" * 73 + "...", "  | ^^"]),
        ("a" * 200, 100, 103, ["1 | ..." + "a" * 70 + "...", "  | " + " " * 65 + "^^^"]),
        ("a" * 200, 199, 201, ["1 | ..." + "a" * 65, "  | " + " " * 66 + "^^"]),
        ("a" * 200, 1, 201, ["1 | " + "a" * 73 + "...", "  | " + "^" * 73]),
        ("a" * 76, 76, 77, ["1 | " + "a" * 76, "  | " + " " * 75 + "^"]),
    ],
)
def test_long_lines_are_windowed(line: str, start: int, end: int, expected: list[str]) -> None:
    found = Diagnostic(code="c", message="m", span=span(1, start, end))
    lines = render(found, {"bad.toml": line}).split("\n")
    assert lines[3:5] == expected


@pytest.mark.parametrize("start", range(1, 400, 7))
@pytest.mark.parametrize("unit", ["ab\t", "\u4f60x", "\x1b[0m", "e\u0301"])
def test_never_wider_than_80_columns(start: int, unit: str) -> None:
    line = (unit * 200)[:400]
    found = Diagnostic(
        code="some-code", message="m " * 60, span=span(1, start, start + 5), label="l " * 30
    )
    for text in render(found, {"bad.toml": line}).split("\n"):
        wide = sum(2 if char == "\u4f60" else char != "\u0301" for char in text)
        assert wide <= 80
        assert text.isprintable() or "\u0301" in text
    assert "^" in render(found, {"bad.toml": line})


def test_long_label_goes_below() -> None:
    found = Diagnostic(code="c", message="m", span=span(1, 70, 72), label="a label that is long")
    lines = render(found, {"bad.toml": "x" * 71}).split("\n")
    assert lines[4] == "  | " + " " * 69 + "^^"
    assert lines[5] == "  | " + " " * 56 + "a label that is long"


def test_style_only_adds() -> None:
    found = Diagnostic(code="c", message="m", span=span(1, 1, 2), label="l", help="h", notes=("n",))
    texts = {"bad.toml": "abc"}
    roles = set()

    def style(role: str, text: str) -> str:
        roles.add(role)
        return f"<{text}>"

    styled = render(found, texts, style)
    assert styled.replace("<", "").replace(">", "").replace("--", "-->") == render(found, texts)
    assert roles == {"error", "message", "gutter", "path", "caret", "label", "help", "note"}


def test_json_is_zero_based() -> None:
    found = Diagnostic(code="c", message="m", span=span(5, 10, 16), help="h", path="model.family")
    assert to_json(found, {}) == {
        "code": "c",
        "severity": "error",
        "message": "m",
        "help": "h",
        "path": "model.family",
        "file": "bad.toml",
        "start": {"line": 4, "character": 9},
        "end": {"line": 4, "character": 15},
    }
    bare = to_json(Diagnostic(code="c", message="m"), {})
    assert (bare["file"], bare["start"], bare["end"]) == (None, None, None)
    json.dumps(bare)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('name = "a"', "name"),
        ('"\U0001f600" = "b"', "b"),
        ("'\U0001d50e\U0001d50e' = { x = 1 } # \U0001f600", "x"),
        ("'e\u0301\u4e2d' = 1", "1"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_counts_utf16_units(line: str, word: str, end: str) -> None:
    """An editor that holds the line in UTF-16 finds the word between `start` and `end`."""
    at = line.index(word) + 1
    found = Diagnostic(code="c", message="m", span=span(2, at, at + len(word)))
    text = f"# \U0001f600{end}{line}{end}"
    for texts, excerpt in (({"bad.toml": text}, ""), ({}, line)):
        told = to_json(attrs.evolve(found, excerpt=excerpt), texts)
        assert told["start"]["line"] == told["end"]["line"] == 1
        units = text.split("\n")[1].encode("utf-16-le")
        piece = units[2 * told["start"]["character"] : 2 * told["end"]["character"]]
        assert piece.decode("utf-16-le") == word


def test_order_and_summary() -> None:
    def made(file: str, line: int, column: int) -> Diagnostic:
        return Diagnostic(code=f"{file}{line}", message="m", span=span(line, column, column, file))

    bare = Diagnostic(code="bare", severity="warning", message="m")
    found = [bare, made("b", 2, 1), made("a", 9, 1), made("b", 1, 5), made("c", 1, 1)]
    assert [one.code for one in sort_diagnostics(found)] == ["b1", "b2", "a9", "c1", "bare"]
    assert [one.code for one in sort_diagnostics(found, ["c"])] == ["c1", "b1", "b2", "a9", "bare"]
    assert summary(found, "bad.toml") == "bad.toml: 4 errors, 1 warning"
    assert summary(found[1:2], "bad.toml") == "bad.toml: 1 error"
    assert summary([], "bad.toml") == ""


@pytest.mark.parametrize(
    ("name", "candidates", "expected"),
    [
        ("rnk", ["alpha", "rank"], "rank"),
        ("rakn", ["alpha", "rank"], "rank"),
        ("Rank", ["rank"], "rank"),
        ("batch-size", ["batch_size"], "batch_size"),
        ("batchsize", ["batch_size"], "batch_size"),
        ("flux", ["sd3", "flux1"], "flux1"),
        ("optim", ["optimizer", "schedule"], "optimizer"),
        ("lr", ["lo", "id"], "lo"),
        ("x", ["y"], None),
        ("banana", ["rank", "alpha"], None),
        ("", ["a"], None),
        ("a" * 5000, ["a" * 4999], None),
        ("fp16", ["bf16", "fp8"], None),
        ("learning_rate", ["rank"], "train.optimizer.lr"),
        ("learning-rate", [], "train.optimizer.lr"),
    ],
)
def test_nearest(name: str, candidates: list[str], expected: str | None) -> None:
    assert nearest(name, candidates, {"learning_rate": "train.optimizer.lr"}) == expected


def test_safe_text() -> None:
    assert safe("a\x00\n\t\u200b\ud800\u00e9") == "a\\x00\\n\\t\\u200b\\ud800\u00e9"
    assert shown("x" * 50) == "x" * 37 + "..."
