"""Overrides, and layers of recipes: what is merged, replaced and refused."""

import datetime
from typing import Any

import pytest

from compiler.diagnostics import Diagnostic
from compiler.overrides import parse_overrides
from compiler.source import (
    Merged,
    Source,
    TableRule,
    merge,
    parse_source,
)
from tests.compiler.toml_texts import at


def parse_override(argument: str) -> tuple[Source | None, list[Diagnostic]]:
    """A single one."""
    sources, diagnostics = parse_overrides([argument])
    return (sources[0] if sources else None), diagnostics


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
