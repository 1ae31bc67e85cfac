"""Forms of captions: each rule of the module's docstring, and that the draws are fair."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.data.variants import forms, joined, tags_of
from compiler.plan import Captions
from tests.compiler.data.test_captions import settings


def told(text: str, *, seed: int = 0, key: str = "a.jpg", **changes: Any) -> tuple[str, ...]:
    return forms([text], settings(**changes), seed=seed, key=key)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "a [trigger] dog, snow"),
        ({"trigger": "k4s4"}, "a k4s4 dog, snow"),
        ({"prefix": "k4s4,"}, "k4s4, a [trigger] dog, snow"),
        ({"prefix": "k4s4, "}, "k4s4, a [trigger] dog, snow"),
        ({"suffix": ", photo"}, "a [trigger] dog, snow, photo"),
        ({"suffix": "photo"}, "a [trigger] dog, snow photo"),
        ({"suffix": "  photo"}, "a [trigger] dog, snow photo"),
    ],
)
def test_dressing(changes: dict[str, str], expected: str) -> None:
    assert told("a [trigger] dog, snow", **changes) == (expected,)


def test_nothing_is_put_on_nothing() -> None:
    rule = {"prefix": "k4s4,", "suffix": "photo", "shuffle": True, "variants": 3}
    assert told("", **rule) == ("", "", "")


@pytest.mark.parametrize(
    ("text", "separator", "tags", "again"),
    [
        ("a, b,c", ",", ["a", "b", "c"], "a, b, c"),
        (", a ,, b, ,", ",", ["a", "b"], "a, b"),
        (",,", ",", [], ""),
        ("a | b|c", "|", ["a", "b", "c"], "a| b| c"),
        ("a | b|c", " | ", ["a", "b", "c"], "a | b | c"),
        ("a  b c", " ", ["a", "b", "c"], "a b c"),
        ("a, a", ",", ["a", "a"], "a, a"),
        ("a||b|c", "||", ["a", "b|c"], "a|| b|c"),
    ],
)
def test_tags(text: str, separator: str, tags: list[str], again: str) -> None:
    assert tags_of(text, separator) == tags
    assert joined(tags, separator) == again


@pytest.mark.parametrize("text", ["a", ",", "a, b", "b, a, c"])
def test_as_many_kept_as_there_are_leaves_the_order(text: str) -> None:
    found = told(text, shuffle=True, tag_dropout=0.9, keep_tokens=3, variants=8)
    assert len(found) == 8 and set(found) == {text}


words = st.lists(st.sampled_from(["red", "dog", "Sks fox", "snow", "dog "]), max_size=6)


@given(words, st.integers(0, 7), st.floats(0, 1), st.booleans(), st.integers(0, 9), st.text())
def test_what_every_form_keeps(
    tags: list[str], keep: int, dropout: float, shuffle: bool, seed: int, key: str
) -> None:
    rule: dict[str, Any] = {
        "shuffle": shuffle,
        "keep_tokens": keep,
        "tag_dropout": dropout,
        "variants": 5,
        "trigger": "sks",
    }
    text = ", ".join(tags)
    found = told(text, seed=seed, key=key, **rule)
    assert found == told(text, seed=seed, key=key, **rule)
    assert len(found) == (5 if shuffle or dropout > 0 else 1)
    clean = [tag.strip() for tag in tags]
    for form in found:
        made = tags_of(form, ",")
        assert made[:keep] == clean[:keep] and bool(made) == bool(clean)
        assert not Counter(made) - Counter(clean)
        assert made.count("Sks fox") == clean.count("Sks fox")
        if dropout == 0:
            assert Counter(made) == Counter(clean)
        if not shuffle:
            rest = iter(clean)
            assert all(tag in rest for tag in made), "the order stays"


def test_every_order_is_equally_likely() -> None:
    found = Counter(told("a, b, c, d", shuffle=True, keep_tokens=1, variants=6000))
    expected = {"a, " + ", ".join(rest) for rest in itertools.permutations("bcd")}
    assert set(found) == expected
    assert all(abs(n - 1000) < 5 * math.sqrt(1000) for n in found.values())


def test_each_tag_is_dropped_as_often_as_it_should() -> None:
    found = told("a, b, c, sks d", tag_dropout=0.3, trigger="sks", variants=4000)
    for tag, share in {"a": 0.7, "b": 0.7, "c": 0.7, "sks d": 1.0}.items():
        count = sum(tag in tags_of(form, ",") for form in found)
        assert abs(count - 4000 * share) <= 5 * math.sqrt(4000 * 0.21) * (share < 1)


def test_forms_follow_seed_key_and_number() -> None:
    text, rule = ", ".join("abcdefghij"), {"shuffle": True, "variants": 4}
    found = [*told(text, **rule), *told(text, key="b.jpg", **rule), *told(text, seed=1, **rule)]
    both = forms([text, text], settings(**rule), seed=0, key="a.jpg")
    assert both[:4] == tuple(found[:4]) and len({*found, *both}) == 16
    assert told(text, key="a\udcff.jpg", **rule)  # a name that is not UTF-8


def test_forms_are_pinned() -> None:
    """Other forms would encode and train other texts than a run that is resumed."""
    rule: Captions = settings(shuffle=True, tag_dropout=0.25, keep_tokens=1, variants=3)
    assert forms(["k, a, b, c, d"], rule, seed=7, key="x.png") == PINNED


PINNED = ("k, c, a, b", "k, d, b, c", "k, b, d, c")
