"""Which blocks wait follows from one course in which none does."""

from __future__ import annotations

import numpy as np
import pytest
from attrs import evolve

from compiler.plan import Layout
from runtime.memory.curve import Curve
from runtime.memory.shallow import shallow
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.waiting import Waiting
from runtime.offload.blocks import moves
from tests.runtime.test_memory_depth import check, deep


def course(*rows: tuple[int, int, int]) -> Curve:
    """(bytes of the new tensor, bytes live, turn) each."""
    sizes, live, turns = (np.array(column) for column in zip(*rows, strict=True))
    hosts = np.array([[0, 0]])
    return Curve(categories=("w",), sizes=sizes, live=live[:, None], turns=turns, hosts=hosts)


def test_weights_come_when_their_block_is_needed_by_hand() -> None:
    """Three blocks of 10 bytes, of which the first and the last wait; a tensor of 1 in each."""
    rows = [(0, 30, 0)]
    for turn in (1, 2, 3, -3, -2, -1):
        rows += [(0, 29 + len(rows) // 2 + 1, turn), (1, 30 + len(rows) // 2 + 1, 0)]
    waiting = Waiting({0: [("w", 4), ("w", 6)], 2: [("w", 10)]})
    assert (waiting.total, waiting.away) == (1024 + 512, {"w": 20})  # pieces, see `offload.host`
    (found,) = waiting.follow([course(*rows)])
    # The first comes, and the last behind it; it leaves at the last one's turn and is sent for in
    # the backward pass, at the end of which the last one leaves.
    assert found.sizes.tolist() == [0, 4, 6, 10, 1, 1, 1, 4, 6, 1, 1, 1]
    assert found.live[:, 0].tolist() == [10, 14, 20, 30, 31, 32, 23, 27, 33, 34, 35, 26]
    assert waiting.away == {"w": 10}
    assert waiting.lower(course((0, 30, 0))).live.tolist() == [[20]]
    assert found.hosts.tolist() == [[1536, 1536]]


@pytest.mark.parametrize(
    ("here", "number", "backward", "expected"),
    [
        ({0}, 0, False, (set(), 1)),
        ({0, 1}, 1, False, ({0}, 2)),
        ({1, 2}, 2, False, ({1}, None)),
        ({2}, 2, True, (set(), 1)),
        ({0, 1}, 0, True, ({1}, None)),
    ],
)
def test_two_blocks_are_there_at_most(
    here: set[int], number: int, backward: bool, expected: tuple[set[int], int | None]
) -> None:
    assert moves(here, number, backward, 3) == expected


def test_one_course_serves_all_that_differ_in_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = RuntimeMemoryModel(), []
    stock = model._run
    monkeypatch.setattr(model, "_run", lambda *given: runs.append(1) or stock(*given))
    peaks = []
    for count in (2, 5, 16):
        step = deep("sana", 16, rank=4, layout=Layout(offload_blocks=count))
        less = shallow(step)
        assert less is not None
        peaks.append(model._deep(step, less, step.shapes[0]).peak)
    assert len(runs) == 1
    assert peaks[0] > peaks[1] > peaks[2]


@pytest.mark.parametrize("count", [2, 3, 11, 14])
def test_parts_of_a_batch(count: int) -> None:
    """Several forward and backward passes in one window."""
    layout = Layout(offload_blocks=count, activation_checkpointing=3)
    check(evolve(deep("sd3", 15, rank=4, layout=layout), micro_batch=1))
