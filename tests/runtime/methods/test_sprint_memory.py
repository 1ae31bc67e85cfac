"""A distillation simulated on meta tensors, against the same two updates on real ones."""

from __future__ import annotations

import pytest
from attrs import evolve

from compiler.memory import Candidate
from tests.runtime.memory_cases import small
from tests.runtime.methods.test_sprint import FACTS
from tests.runtime.test_memory_exact import MODEL, check, real


def sprint(heads: tuple[int, ...] = (0, 2), **overrides: object) -> Candidate:
    facts = evolve(FACTS, heads=heads)
    made = small("sana", compute="bfloat16", trained="float32", **overrides)
    return evolve(made, sprint=evolve(facts, discriminator=made.optimizer))


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_byte_for_byte(checkpointing: int) -> None:
    check(sprint(checkpointing=checkpointing))


def test_without_a_discriminator() -> None:
    check(evolve(sprint(), sprint=evolve(FACTS, heads=(), adversarial_weight=0.0)))


def test_checkpointing_saves_and_heads_cost() -> None:
    """And the two updates' operations are counted, the student's and the discriminator's."""
    plain, saving = (real(sprint(checkpointing=every)) for every in (0, 1))
    more = real(sprint((0, 1, 2)))
    assert saving.peak < plain.peak < more.peak
    assert saving.load == plain.load
    course = MODEL.course(sprint(), sprint().shapes[0])
    alone = MODEL.course(small("sana", compute="bfloat16", trained="float32"), sprint().shapes[0])
    assert course.flops > alone.flops > 0
