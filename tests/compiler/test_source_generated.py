"""Generated documents: every key and value has its place."""

import datetime
import tomllib

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.toml_texts import check_all_spans, faults, parsed, same

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
