"""Mutated recipes: diagnostics or a recipe, never an exception."""

import json
import random
import time

import pytest

from compiler.diagnostics import render, safe, to_json
from compiler.overrides import parse_overrides
from compiler.source import merge, parse_source
from compiler.structure import structure, tagged_paths
from tests.compiler.example import GOOD, Recipe

HOSTILE = [
    "\x00", "\x1b[31m", "\ud800", "\u202e", "\ufeff", "\u00e9", "\u4f60", "\r", "\r\n", "\n", "\t",
    "\\",
    '"', "'", '"""', "'''", "[", "]", "[[", "]]", "{", "}", ",", ".", "=", "#", ":", ";", "-", "+",
    "_",
    "[" * 100, "{a=" * 60, "a." * 100, "9" * 5000, "1e400", "-1", "0", "nan", "-inf", "1_0", "0x1F",
    "true", "True", "null", "2024-01-01", "2024-01-01T00:00:00Z", "07:32:00", "a = 1\n", "[a]\n",
    "[[source]]\n", "[train]\n", "[train.optimizer]\n", "kind = 'lokr'\n", "{key}", "{value}",
    "{table}",
    "{{}", "%s", "10%", "24 GiB", "x" * 300, "\u0661", "\\u00", "\\U0010FFFF", "lr = 1\n", "= = =",
]  # fmt: skip


def mutate(text: str, rng: random.Random) -> str:
    """One small change of a text."""
    start = rng.randrange(len(text) + 1)
    end = min(len(text), start + rng.randrange(1, 12))
    lines = text.split("\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(9):
        case 0:
            return text[:start] + text[end:]
        case 1:
            return text[:start] + rng.choice(HOSTILE) + text[start:]
        case 2:
            return text[:start] + rng.choice(HOSTILE) + text[end:]
        case 3:
            lines[at], lines[other] = lines[other], lines[at]
        case 4:
            lines.insert(at, lines[other])
        case 5:
            del lines[at]
        case 6:
            lines[at] = lines[at].partition("=")[0] + "= " + rng.choice(HOSTILE)
        case 7:
            lines[at] = lines[at].replace("=", rng.choice([":", "==", "", "=\n"]))
        case _:
            swapped = text[start:end][::-1] if rng.random() < 0.5 else text[start:end].swapcase()
            return text[:start] + swapped + text[end:]
    return "\n".join(lines)


def columns(line: str) -> int:
    return sum(2 if char == "\u4f60" else 1 for char in line)


def check(text: str, rng: random.Random) -> bool:
    """Run all of the front end on a text; whether it was a good recipe."""
    source, diagnostics = parse_source(text, "fuzz.toml")
    assert (source is None) == bool(diagnostics)
    texts = {"fuzz.toml": text}
    recipe = None
    if source is not None:
        arguments = [mutate(rng.choice(["train.steps=3", "source[0].id=x", "a.b=[1]"]), rng)]
        overrides, more = parse_overrides(arguments if rng.random() < 0.3 else [])
        merged, missed = merge([source, *overrides], tagged_paths(Recipe))
        recipe, faults = structure(merged.data, Recipe, merged, {"max_steps": "train.steps"})
        assert (recipe is None) == bool(faults)
        diagnostics = [*more, *missed, *faults]
        texts = merged.texts | {"--set": "\n".join(arguments)}
    for diagnostic in diagnostics:
        for line in render(diagnostic, texts).split("\n"):
            assert columns(line) <= 80 or "--> " in line
            assert safe(line) == line
        json.dumps(to_json(diagnostic, texts), ensure_ascii=True)
        span = diagnostic.span
        assert diagnostic.message
        assert span is None or (span.line, span.column) <= (span.end_line, span.end_column)
        assert span is None or span.line <= texts[span.file].count("\n") + 1
    return recipe is not None


def fuzz(count: int, seed: int) -> int:
    """Check `count` recipes of one to four mutations; the number that were still good."""
    rng = random.Random(seed)
    good = 0
    for number in range(count):
        text = GOOD
        for _ in range(rng.randrange(1, 5)):
            text = mutate(text, rng)
        start = time.perf_counter()
        try:
            good += check(text, rng)
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed}: {text!r}") from error
        assert time.perf_counter() - start < 10
    return good


def test_mutated_recipes() -> None:
    assert 0 < fuzz(2_000, seed=1) < 2_000


@pytest.mark.slow
def test_many_mutated_recipes() -> None:
    assert 0 < fuzz(1_500, seed=2) < 1_500
