"""The rows of the recipe's keys against its classes."""

from __future__ import annotations

import pytest

from compiler.reference import all_rows, row_of, spelt


def test_a_row_says_all_there_is() -> None:
    row = row_of("adapter.rank")
    assert row is not None
    assert (row.words, row.range, row.default, row.required) == (
        "a whole number", "1 to 16384", "16", False,
    )  # fmt: skip
    assert row.doc == "Rank of the update."
    rate = row_of("train.optimizer.lr")
    assert rate is not None and rate.required and rate.range == "> 0" and rate.default == ""
    decay = row_of("train.ema.decay")
    assert decay is not None and decay.range == "> 0 and < 1"
    share = row_of("data.captions.dropout")
    assert share is not None and share.range == "0 to 1"
    warmup = row_of("train.schedule.warmup")
    assert warmup is not None and warmup.default == '"0 steps"'


def test_arrays_free_tables_and_unknown_keys() -> None:
    path = row_of("data.source[3].path")
    assert path is not None and path.key == "data.source[].path"
    assert row_of("data.source") == row_of("data.source[0]")
    assert row_of("data.captions.from") is not None  # not the attribute's name
    prompts = row_of("validation.prompts.beach")
    assert prompts is not None and prompts.key == "validation.prompts"
    for key in ("nope", "adapter.nope", "adapter.rank.nope.x", "data.captions.source", ""):
        assert row_of(key) is None


def test_every_key_is_documented_in_a_sentence() -> None:
    for row in all_rows():
        assert row.doc.endswith("."), row.key
        assert row.words


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (1, "1"), (1e-8, "1e-08"), ("a", '"a"'), ((1, 2.5), "[1, 2.5]"), ({}, "{}")],
)
def test_values_are_spelt_as_in_a_recipe(value: object, text: str) -> None:
    assert spelt(value) == text
