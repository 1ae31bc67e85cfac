"""Occasions against the plain list that they stand for."""

from __future__ import annotations

from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.occasions import Occasions


@given(st.integers(0, 12), st.integers(1, 40), st.booleans())
def test_they_are_every_nth_step_and_the_last(every: int, total: int, start: bool) -> None:
    expected = [0] if start else []
    expected += [step for step in range(1, total + 1) if every and step % every == 0]
    if expected[-1:] != [total]:
        expected.append(total)
    found = Occasions(every, total, start=start)
    assert found == expected and list(found) == expected and len(found) == len(expected)
    assert [found[at] for at in range(-len(expected), 0)] == expected
    assert found[1:3] == expected[1:3]
    for step in range(-1, total + 2):
        assert (step in found) == (step in expected)
        assert bisect_left(found, step) == bisect_left(expected, step)
    with pytest.raises(IndexError):
        found[len(expected)]


def test_there_may_be_very_many() -> None:
    found = Occasions(1, 10**12)
    assert len(found) == 10**12 and found[-1] == 10**12 and 10**11 in found
    assert list(Occasions(1, 0)) == []
