"""Faults of values: exact text, place and path, all of them at once."""

import enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from attrs import field, frozen

from compiler.diagnostics import Diagnostic, render
from compiler.kinds import LEAVES
from compiler.overrides import parse_overrides
from compiler.source import TableRule, merge, parse_source
from compiler.structure import (
    Length,
    Range,
    converter,
    register_leaf,
    structure,
    tagged_paths,
    type_words,
)
from compiler.units import ByteSize, Interval, Share
from tests.compiler.example import GOOD, Captions, Lokr, Lora, Mode, Optimizer, Recipe


def found(
    text: str, cls: type = Recipe, synonyms: dict[str, str] | None = None
) -> list[Diagnostic]:
    """The faults of a recipe's text, which must not be a syntax error."""
    source, syntax = parse_source(text, "bad.toml")
    assert source is not None, syntax
    value, diagnostics = structure(source.data, cls, source, synonyms)
    assert (value is None) == bool(diagnostics)
    for diagnostic in diagnostics:
        render(diagnostic, source.texts)
    return diagnostics


def shown(text: str, cls: type = Recipe) -> str:
    source, _ = parse_source(text, "bad.toml")
    assert source is not None
    return "\n\n".join(
        render(diagnostic, source.texts) for diagnostic in structure(source.data, cls, source)[1]
    )


def lines(text: str, cls: type = Recipe, synonyms: dict[str, str] | None = None) -> list[str]:
    """Each fault as `line:column code path: message (label) [help]`."""
    out = []
    for one in found(text, cls, synonyms):
        assert one.span is not None
        rest = f" ({one.label})" * bool(one.label) + f" [{one.help}]" * bool(one.help)
        place = f"{one.span.line}:{one.span.column}"
        out.append(f"{place} {one.code} {one.path}: {one.message}{rest}")
    return out


@frozen(kw_only=True)
class One:
    """One key of each kind."""

    i: int = 0
    f: float = 0.0
    b: bool = False
    s: str = ""
    lit: Literal["bf16", "fp16", "auto"] = "auto"
    num: Literal[1, 2] = 1
    yes: Literal[True, "auto"] = "auto"
    t: tuple[str, ...] = ()
    names: list[str] = field(factory=list)
    some: frozenset[int] = frozenset()
    pair: tuple[int, str] = (1, "")
    d: dict[str, int] = field(factory=dict)
    n: dict[int, str] = field(factory=dict)
    mixed: int | str = 0
    auto: Annotated[int, Range(ge=0)] | Literal["off", "auto"] = "auto"
    text_or_more: str | tuple[str, ...] = ""
    size: ByteSize | Literal["auto"] = "auto"
    every: Interval = field(factory=lambda: Interval.parse("off"))
    warm: Share = field(factory=lambda: Share.parse("0%"))
    mode: Mode = Mode.EXACT
    table: Captions | None = None
    opt: Optimizer = field(factory=Optimizer)
    any: Any = None
    short: Annotated[str, Length(ge=2, le=3)] = "ab"
    few: Annotated[tuple[int, ...], Length(ge=1, le=2)] = (1,)
    low: Annotated[int, Range(gt=0, lt=10)] = 1
    loose: Annotated[float, Range(ge=0, nonfinite=True)] = 0.0


def test_a_good_recipe() -> None:
    source, _ = parse_source(GOOD, "good.toml")
    assert source is not None
    recipe, diagnostics = structure(source.data, Recipe, source)
    assert not diagnostics
    assert recipe is not None
    assert recipe.adapter == Lora(kind="lora", rank=16, targets=("attn", "ff"))
    assert [one.id for one in recipe.source] == ["subject", "reg"]
    assert recipe.source[0].captions == Captions(source="textfile", dropout=0.1)
    assert recipe.source[1].size == (512, 768)
    assert recipe.train.optimizer.lr == 1.5e-3
    assert recipe.train.batch_size == {512: 4, 1024: 1}
    assert recipe.train.every.steps == 200
    assert recipe.train.budget == ByteSize(bytes=24 * 2**30)
    assert recipe.train.prompts == {"portrait": 'a "wide" view'}


# every row of style.md 3.1: what cattrs would have taken or said badly


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('i = "8"', '1:5 wrong-type i: `i` must be a whole number, found the string `"8"`'
         " [write `i = 8`, without quotes]"),
        ("i = 3.9", "1:5 wrong-type i: `i` must be a whole number, found the number `3.9`"),
        ("i = 3.0", "1:5 wrong-type i: `i` must be a whole number, found the number `3.0`"
         " [write `i = 3`]"),
        ("i = true", "1:5 wrong-type i: `i` must be a whole number, found `true`"),
        ('b = "false"',
         '1:5 wrong-type b: `b` must be `true` or `false`, found the string `"false"`'
         " [write `b = false`]"),
        ("b = 1", "1:5 wrong-type b: `b` must be `true` or `false`, found the number `1`"),
        ('t = "attn"', '1:5 wrong-type t: `t` must be an array, found the string `"attn"`'
         ' [write `t = ["attn"]`]'),
        ("s = 3",
         "1:5 wrong-type s: `s` must be a string, found the number `3` [write `s = \"3\"`]"),
        ("adapter.kind = 'lroa'", "1:16 unknown-value adapter.kind: unknown value `lroa`"
         " [did you mean `lora`?]"),
        ("adapter = {}", "1:11 missing-key adapter.kind: missing key `kind` in `adapter`"
         " [add `kind = ...` (one of `lora`, `lokr`)]"),
        ("adapter = { kind = 'lora', rank = 0, alpha = -1 }",
         "1:35 out-of-range adapter.rank: 0 is out of range (must be >= 1)"
         "|1:46 out-of-range adapter.alpha: -1 is out of range (must be > 0)"),
        ("lit = 'bf61'", "1:7 unknown-value lit: unknown value `bf61` [did you mean `bf16`?]"),
        ("adapter = 3", "1:11 wrong-type adapter: `adapter` must be a table, found the number `3`"),
        ("mixed = true", "1:9 wrong-type mixed: `mixed` must be a whole number or a string,"
         " found `true` [write `mixed = \"true\"`]"),
    ],
)  # fmt: skip
def test_what_cattrs_would_convert(text: str, expected: str) -> None:
    @frozen(kw_only=True)
    class Both(One):
        adapter: Lora | Lokr | None = None

    assert "|".join(lines(text, Both)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f = 3", ""),
        ("f = 1e400", "1:5 out-of-range f: 1e400 is not a finite number"),
        ("f = nan", "1:5 out-of-range f: nan is not a finite number"),
        ("f = -inf", "1:5 out-of-range f: -inf is not a finite number"),
        ('f = "1e-4"', '1:5 wrong-type f: `f` must be a number, found the string `"1e-4"`'
         " [write `f = 1e-4`, without quotes]"),
        ("f = [1.0]", "1:5 wrong-type f: `f` must be a number, found an array"
         " [write one value, without the brackets]"),
        ("f = [1, 2]", "1:5 wrong-type f: `f` must be a number, found an array"),
        ("f = { a = 1 }", "1:5 wrong-type f: `f` must be a number, found a table"),
        ("[f]\na = 1", "1:1 wrong-type f: `f` must be a number, found a table"),
        ("loose = inf", ""),
        ("loose = nan", ""),
        ("loose = -inf", "1:9 out-of-range loose: -inf is out of range (must be >= 0)"),
        ("s = 2024-01-01", "1:5 wrong-type s: `s` must be a string, found the date `2024-01-01`"
         ' [write `s = "2024-01-01"` if text is meant]'),
        ("i = 07:32:00", "1:5 wrong-type i: `i` must be a whole number, found the date `07:32:00`"
         " [a recipe holds no dates]"),
        ("every = 2024-01-01", "1:9 wrong-type every: `every` must be an interval such as"
         " `400 steps`, `1 epoch`, `30 min` or `off`, found the date `2024-01-01`"
         " [a recipe holds no dates]"),
        ("every = true", "1:9 wrong-type every: `every` must be an interval such as"
         " `400 steps`, `1 epoch`, `30 min` or `off`, found `true`"),
        ("every = 4e2", '1:9 bad-unit every: `4e2` has no unit [write `every = "4e2 epochs"`]'),
        ("every = 400", '1:9 bad-unit every: `400` has no unit [write `every = "400 steps"`]'),
        ("every = '400'", "1:9 bad-unit every: `400` has no unit [say `400 steps`]"),
        ("every = '{key}'", "1:9 bad-unit every: `{key}` is not a number with a unit"
         " [the unit is `steps`, `epochs`, `min` or `h`]"),
        ("warm = 1e400", "1:8 bad-unit warm: `1e400` is not a number with a unit"
         " [the unit is `%` or `steps`]"),
        ("size = '24G'", "1:8 bad-unit size: `24G` has an unknown unit"
         " [say `24 GiB` (1024) or `24 GB` (1000)]"),
        ("size = 'atuo'", "1:8 unknown-value size: unknown value `atuo` [did you mean `auto`?]"),
        ("size = []", "1:8 wrong-type size: `size` must be a size such as `24 GiB`, `8 GB` or"
         " `512 MiB`; or `auto`, found an array"),
        ("auto = -1", "1:8 out-of-range auto: -1 is out of range (must be >= 0)"),
        ("auto = 'of'", "1:8 unknown-value auto: unknown value `of` [did you mean `off`?]"),
        ("auto = '8'",
         "1:8 unknown-value auto: unknown value `8` [write `auto = 8`, without quotes]"),
        ("auto = 'banana'", "1:8 unknown-value auto: unknown value `banana`"
         " [it must be a whole number, `off` or `auto`]"),
        ("auto = 1.5", "1:8 wrong-type auto: `auto` must be a whole number, `off` or `auto`,"
         " found the number `1.5`"),
        ("lit = 3", "1:7 wrong-type lit: `lit` must be one of `bf16`, `fp16`, `auto`,"
         " found the number `3`"),
        ("lit = 'x'", "1:7 unknown-value lit: unknown value `x`"
         " [it must be one of `bf16`, `fp16`, `auto`]"),
        ("num = 3", "1:7 unknown-value num: unknown value `3` [it must be one of `1`, `2`]"),
        ("num = true", "1:7 wrong-type num: `num` must be one of `1`, `2`, found `true`"),
        ("yes = false", "1:7 unknown-value yes: unknown value `false`"
         " [it must be one of `true`, `auto`]"),
        ("mode = 'Quick'", "1:8 unknown-value mode: unknown value `Quick` [did you mean `quick`?]"),
        ("t = ['a', 3, true]", '1:11 wrong-type t[1]: `t[1]` must be a string, found the number `3`'
         ' [write `"3"`]|1:14 wrong-type t[2]: `t[2]` must be a string, found `true` [write'
         ' `"true"`]'),
        ("pair = [1]", "1:8 wrong-type pair: `pair` must have 2 entries, not 1"),
        ("pair = ['a', 'b']", "1:9 wrong-type pair[0]: `pair[0]` must be a whole number,"
         ' found the string `\'a\'`'),
        ("d = { a = 1, b = 'x' }", "1:18 wrong-type d.b: `b` must be a whole number,"
         " found the string `'x'`"),
        ("d = 3", "1:5 wrong-type d: `d` must be a table, found the number `3`"),
        ("n = { 512 = 'a', x = 'b' }",
         "1:18 wrong-type n.x: key `x` in `n` must be a whole number"),
        ("[n]\nx = 'b'", "2:1 wrong-type n.x: key `x` in [n] must be a whole number"),
        ("text_or_more = 3", "1:16 wrong-type text_or_more: `text_or_more` must be a string or"
         ' an array, found the number `3` [write `text_or_more = "3"`]'),
        ("text_or_more = ['a', 3]", "1:22 wrong-type text_or_more[1]: `text_or_more[1]` must be a"
         ' string, found the number `3` [write `"3"`]'),
        ("table = 'x'", "1:9 wrong-type table: `table` must be a table, found the string `'x'`"
         " [write `[table]` with a line for each key]"),
        ("table.form = 'x'", "1:7 unknown-key table.form: unknown key `form` in `table`"
         " [did you mean `from`?]"),
        ("table.from = 'x'", "1:14 unknown-value table.from: unknown value `x`"
         " [it must be one of `textfile`, `filename`]"),
        ("opt = 'lion'", ""),
        ("opt = 'lino'", "1:7 unknown-value opt.name: unknown value `lino` [did you mean `lion`?]"),
        ("opt = 3", "1:7 wrong-type opt.name: `name` must be one of `adamw`, `lion`,"
         " found the number `3`"),
        ("opt = []", "1:7 wrong-type opt: `opt` must be a table, found an array"),
        ("short = 'a'", "1:9 out-of-range short: `short` has 1 character (must have at least 2)"),
        ("short = 'abcd'",
         "1:9 out-of-range short: `short` has 4 characters (must have at most 3)"),
        ("few = []", "1:7 out-of-range few: `few` is empty (needs 1 entry)"),
        ("few = [1, 2, 3]", "1:7 out-of-range few: `few` has 3 entries (must have at most 2)"),
        ("low = 10", "1:7 out-of-range low: 10 is out of range (must be > 0 and < 10)"),
        ("low = 0x10", "1:7 out-of-range low: 0x10 is out of range (must be > 0 and < 10)"),
        ("names = 'a'", "1:9 wrong-type names: `names` must be an array, found the string `'a'`"
         " [write `names = ['a']`]"),
        ("some = [1, 1]", ""),
        ("any = [1, { a = 'x' }]", ""),
        ("zzz = 1", "1:1 unknown-key zzz: unknown key `zzz` at the top level [known keys: `i`, `f`,"
         " `b`, `s`, `lit`, `num`, `yes`, `t`, `names`, `some`, `pair`, `d` and 15 more]"),
        ("I = 1\ni = 2", "1:1 unknown-key I: unknown key `I` at the top level"
         " [`i` is given too: take this one out]"),
    ],
)  # fmt: skip
def test_each_kind(text: str, expected: str) -> None:
    assert "|".join(lines(text, One)) == expected


def test_all_faults_of_a_recipe_in_the_shape_of_the_design() -> None:
    text = """\
schema = 1
[model]
family = "flux"
base = "x"

[adapter]
kind = "lora"
rnk = 16
alpha = -1

[[source]]
id = "a"
[[source]]
repeats = "2"
"""
    assert (
        shown(text)
        == """\
error[unknown-value]: unknown value `flux`
 --> bad.toml:3:10
  |
3 | family = "flux"
  |          ^^^^^^
  |
help: did you mean `flux1`?

error[unknown-key]: unknown key `rnk` in [adapter]
 --> bad.toml:8:1
  |
8 | rnk = 16
  | ^^^
  |
help: did you mean `rank`?

error[out-of-range]: -1 is out of range
 --> bad.toml:9:9
  |
9 | alpha = -1
  |         ^^ must be > 0
  |

error[missing-key]: missing key `path` in [[source]] entry 1
  --> bad.toml:11:1
   |
11 | [[source]]
   | ^^^^^^^^^^
   |
help: add `path = ...` (a string)

error[missing-key]: missing keys `path`, `id` in [[source]] entry 2
  --> bad.toml:13:1
   |
13 | [[source]]
   | ^^^^^^^^^^
   |
help: add `path = ...` (a string) and `id = ...` (a string)

error[wrong-type]: `repeats` must be a number, found the string `"2"`
  --> bad.toml:14:11
   |
14 | repeats = "2"
   |           ^^^
   |
help: write `repeats = 2`, without quotes"""
    )


REST = 'schema = 1\nmodel = { family = "sd3", base = "x" }\nsource = [{ path = "a", id = "b" }]\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["1:1 missing-key : missing keys `schema`, `model`, `source` at the top level"
              " [add `schema = ...` (`1`) and `[model]` and `[[source]]`]"]),
        (REST + "[train]\nlr = 1", ["5:1 unknown-key train.lr: unknown key `lr` in [train]"
                                    " [did you mean `train.optimizer.lr`?]"]),
        (REST + "[train]\nlearning_rate = 1", [
            "5:1 unknown-key train.learning_rate: unknown key `learning_rate` in [train]"
            " [did you mean `train.optimizer.lr`?]"]),
        (REST + "[train.optimizer]\nlearning_rate = 1", [
            "5:1 unknown-key train.optimizer.learning_rate: unknown key `learning_rate` in"
            " [train.optimizer] [did you mean `lr`?]"]),
        (REST + "max_steps = 1", ["4:1 unknown-key max_steps: unknown key `max_steps` at the top"
                                  " level [did you mean `train.steps`?]"]),
        (REST + "repeats = 1", ["4:1 unknown-key repeats: unknown key `repeats` at the top level"
                                " [did you mean `source.repeats`?]"]),
        (REST + "[adapter]\nknd = 'lora'\nrank = 3", [
            "5:1 unknown-key adapter.knd: unknown key `knd` in [adapter] [did you mean `kind`?]"]),
        (REST + "[adapter]\nrank = 3", [
            "4:1 missing-key adapter.kind: missing key `kind` in [adapter]"
            " [add `kind = ...` (one of `lora`, `lokr`)]"]),
        (REST + "[adapter]\nkind = 3", [
            "5:8 wrong-type adapter.kind: `kind` must be one of `lora`, `lokr`, found the number"
            " `3`"]),
        (REST + "[adapter]\nkind = 'lokr'\nrank = 3", [
            "6:1 unknown-key adapter.rank: unknown key `rank` in [adapter]"
            " [only another kind of this table has it; known keys: `kind`, `factor`]"]),
        (REST + "[train.batch_size]\n512 = 0\n1024 = 'x'", [
            "5:7 out-of-range train.batch_size.512: 0 is out of range (must be >= 1)",
            "6:8 wrong-type train.batch_size.1024: `1024` must be a whole number,"
            " found the string `'x'`"]),
        ("schema = 2\n" + REST[11:], ["1:10 unknown-value schema: unknown value `2`"
                                      " [it must be `1`]"]),
        (REST.replace("[{ path = \"a\", id = \"b\" }]", "{ path = 'a', id = 'b' }"), [
            "3:10 wrong-type source: `source` must be an array, found a table"
            " [write `[[source]]`, once for each entry]"]),
    ],
)  # fmt: skip
def test_recipes(text: str, expected: list[str]) -> None:
    assert lines(text, Recipe, {"max_steps": "train.steps"}) == expected


def test_a_key_in_the_wrong_table_is_not_also_missing() -> None:
    text = REST.replace(', base = "x"', "") + 'base = "x"\n'
    (only,) = lines(text)
    assert only.endswith("unknown key `base` at the top level [did you mean `model.base`?]")


def test_faults_of_layers_point_into_each() -> None:
    preset, _ = parse_source(REST + '[train]\noptimizer = "adamw"\n', "preset:p", "preset")
    recipe, _ = parse_source("[train]\nstepps = 3\n[train.optimizer]\nlr = 0\n", "r.toml")
    over, _ = parse_overrides(["train.mode=quik", "source[0].repeats=x", "train.every=3"])
    assert preset is not None
    assert recipe is not None
    merged, diagnostics = merge([preset, recipe, *over], tagged_paths(Recipe))
    assert not diagnostics
    _, faults = structure(merged.data, Recipe, merged)
    places = [(one.span.file, one.span.line, one.span.column) for one in faults if one.span]
    assert places == [
        ("r.toml", 2, 1),
        ("r.toml", 4, 6),
        ("--set", 1, 12),
        ("--set", 2, 19),
        ("--set", 3, 13),
    ]
    assert render(faults[2], merged.texts) == (
        "error[unknown-value]: unknown value `quik`\n"
        " --> --set:1:12\n"
        "  |\n"
        "1 | train.mode=quik\n"
        "  |            ^^^^\n"
        "  |\n"
        "help: did you mean `quick`?"
    )


def test_tagged_paths() -> None:
    assert tagged_paths(Recipe) == {
        ("adapter",): TableRule(tag="kind"),
        ("train", "optimizer"): TableRule(shorthand="name"),
    }


def test_shorthand_of_a_tagged_union() -> None:
    @frozen(kw_only=True)
    class A:
        __shorthand__: ClassVar[str] = "name"
        name: Literal["a"]
        x: int = 1

    @frozen(kw_only=True)
    class B:
        __shorthand__: ClassVar[str] = "name"
        name: Literal["b"]

    @frozen(kw_only=True)
    class Root:
        o: A | B | Literal["auto"] = "auto"

    for text, expected in (("'a'", A(name="a")), ("'auto'", "auto"), ("{name='b'}", B(name="b"))):
        source, _ = parse_source(f"o = {text}", "r.toml")
        assert source is not None
        assert structure(source.data, Root, source) == (Root(o=expected), [])
    assert lines("o = 'c'", Root)[0].startswith("1:5 unknown-value o.name: unknown value `c`")


def test_registered_leaf() -> None:
    def parse(value: str | float) -> Path:
        if not isinstance(value, str) or "\0" in value or not value:
            raise ValueError("a path is a string that is not empty")
        return Path(value)

    @frozen(kw_only=True)
    class Root:
        where: Path

    register_leaf(Path, parse, "a path", code="bad-path")
    try:
        source, _ = parse_source("where = 'a/b'", "r.toml")
        assert source is not None
        assert structure(source.data, Root, source)[0] == Root(where=Path("a/b"))
        assert lines("where = ''", Root) == [
            "1:9 bad-path where: a path is a string that is not empty"
        ]
        assert lines("where = []", Root) == [
            "1:9 wrong-type where: `where` must be a path, found an array"
        ]
    finally:
        del LEAVES[Path]
        converter.cache_clear()


def test_bugs_of_ours_are_not_faults_of_the_user() -> None:
    class Broken:
        expects: ClassVar[str] = "anything"

        @classmethod
        def parse(cls, value: object) -> "Broken":
            raise RuntimeError("ours")

    @frozen(kw_only=True)
    class Root:
        x: Broken

    source, _ = parse_source("x = 1", "r.toml")
    assert source is not None
    with pytest.raises(RuntimeError):
        structure(source.data, Root, source)


@pytest.mark.parametrize("kind", [set[int], Lora | Optimizer, complex])
def test_types_no_recipe_can_hold(kind: Any) -> None:
    with pytest.raises(TypeError):
        converter().get_structure_hook(kind)


def test_very_many_faults_are_cut() -> None:
    text = "t = [" + "1," * 1000 + "]"
    diagnostics = found(text, One)
    assert len(diagnostics) == 201
    assert diagnostics[-1].message == "800 more faults are not shown"


def test_words() -> None:
    class Color(enum.Enum):
        RED = "red"

    assert type_words(int) == "a whole number"
    assert type_words(float | None) == "a number"
    assert type_words(Color) == "`red`"
    assert type_words(Literal["a", "b"]) == "one of `a`, `b`"
    assert type_words(int | Literal["auto"]) == "a whole number or `auto`"
    assert type_words(ByteSize | Literal["auto", "none"]) == (
        "a size such as `24 GiB`, `8 GB` or `512 MiB`; or one of `auto`, `none`"
    )
