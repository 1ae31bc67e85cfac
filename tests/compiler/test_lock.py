"""What differs between two plans, entry by entry."""

from __future__ import annotations

import attrs
from attrs import evolve

from compiler.lock import changes, differences, dumps, loads
from compiler.plan import NOT_TRAJECTORY, Plan, alters_trajectory
from tests.tuner.examples import quickstart


def test_entries_of_lists_are_paired_by_what_names_them() -> None:
    old = quickstart()
    first, second = old.buckets
    new = evolve(old, buckets=(evolve(second, batches=2),))
    assert [(key, a, b) for key, a, b in changes(old, new) if "96x64" in key] == [
        ("buckets[zorps 96x64].batches", 1, 2)
    ]
    (gone,) = [row for row in changes(old, new) if "64x64]" in row[0]]
    assert gone[0] == f"buckets[{first.source} 64x64]" and gone[2] is None
    assert gone[1]["images"] == first.images


def test_configurations_are_compared_key_by_key() -> None:
    old = quickstart()
    new = evolve(old, model=evolve(old.model, configs={"transformer": '{"num_layers": 3}'}))
    assert changes(old, new) == [("model.configs.transformer.num_layers", None, 3)]


def test_what_no_digest_holds_is_no_change() -> None:
    old = quickstart()
    new = evolve(old, decisions=(), memory=evolve(old.memory, budget_bytes=1))
    assert changes(old, new) == [] and old.digest == new.digest
    assert changes(old, loads(dumps(old))) == []


def test_a_change_as_text() -> None:
    old = quickstart()
    assert differences(old, evolve(old, seed=8)) == [("seed", "7", "8")]


def test_what_alters_the_trajectory() -> None:
    assert set(NOT_TRAJECTORY) <= {field.name for field in attrs.fields(Plan)}
    for key in ("seed", "optimizer.lr", "sources[a.b].repeats", "threads", "buckets"):
        assert alters_trajectory(key)
    for key in ("name", "validation.prompts[beach].text", "checkpoints.keep", "track", "memory.x"):
        assert not alters_trajectory(key)
    assert isinstance(quickstart(), Plan)
