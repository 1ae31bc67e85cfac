"""Runs that are gone on with by another plan: what is refused, and what is taken."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import torch
from attrs import evolve

from compiler import lock
from compiler.plan import Plan, lock_path
from runtime.errors import PlanChanged, RunFailed
from runtime.execute import execute
from tests.runtime.run_plan import Interrupting, run
from tests.runtime.whole_runs import (
    NEVER,
    assert_equal,
    final,
    make,
    metrics_of,
    place,
)

__all__ = ["make", "place"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and POSIX signals")


def test_another_plan_in_the_same_folder_is_refused(make):
    plan, manifest = make(steps=2)
    assert run(plan, manifest, Interrupting(*NEVER)) == 0
    with pytest.raises(PlanChanged, match=r"optimizer\.lr"):
        execute(
            evolve(plan, optimizer=evolve(plan.optimizer, lr=1.0)), manifest, Interrupting(*NEVER)
        )


def test_an_accepted_change_holds_from_the_checkpoint_on(make):
    """Of the learning rate, and of an argument that lies in the optimizer's state too."""
    from compiler.schedules import multiplier
    from tuner.run import _accept

    whole, manifest = make(name="whole")
    assert run(whole, manifest, Interrupting(*NEVER)) == 0
    ends = []
    for name, decay in (("rate", 0.01), ("both", 0.5)):
        plan, _ = make(name=name, optimizer="adamw")
        first = evolve(plan, optimizer=evolve(plan.optimizer, arguments=arguments(plan, 0.01)))
        assert run(first, manifest, Interrupting("step", 3, signal.SIGTERM)) == 130
        changed = evolve(
            first, optimizer=evolve(first.optimizer, lr=0.2, arguments=arguments(plan, decay))
        )
        with pytest.raises(PlanChanged) as caught:
            execute(changed, manifest, Interrupting(*NEVER))
        assert not _accept(changed, caught.value, ())
        assert _accept(changed, caught.value, ("optimizer.lr", "optimizer.arguments"))
        assert run(changed, manifest, Interrupting(*NEVER)) == 0
        rows = metrics_of(changed)
        assert [row["step"] for row in rows] == list(range(1, 8))
        assert rows[:3] == metrics_of(whole)[:3]
        for row in rows:
            rate = (plan.optimizer.lr if row["step"] <= 3 else 0.2) * multiplier(
                plan.schedule, row["step"] - 1
            )
            assert row["lr"] == pytest.approx(rate, rel=1e-12)
        ends.append(final(changed)[1])
    assert any(not torch.equal(ends[0][k], ends[1][k]) for k in ends[0] if k.startswith("weights"))


def test_what_can_not_be_gone_on_with_leaves_the_run_as_it_was(make, monkeypatch):
    from runtime import folder, resume

    plan, manifest = make()
    assert run(plan, manifest, Interrupting("step", 3, signal.SIGTERM)) == 130
    changed = evolve(plan, optimizer=evolve(plan.optimizer, lr=0.2))
    folder.accept(changed, "")

    def refused(*arguments, **named):
        raise RunFailed("no part of it fits")

    with monkeypatch.context() as patched:
        patched.setattr(resume, "load", refused)
        assert run(changed, manifest, Interrupting(*NEVER)) == 1
    assert lock.read(lock_path(Path(plan.run_folder))).digest == plan.digest
    assert run(plan, manifest, Interrupting(*NEVER)) == 0


def test_a_finished_run_is_given_more_steps(make):
    """It equals one that had them from the start, and so does its result."""
    from tuner.run import _accept, _at_its_end

    whole, manifest = make(name="whole")
    plan, _ = make(name="longer", steps=4, schedule=whole.schedule)
    assert run(whole, manifest, Interrupting(*NEVER)) == 0
    assert run(plan, manifest, Interrupting(*NEVER)) == 0
    for total, why in ((3, "can't go back to 3"), (4, "only be given more steps than 4"), (7, "")):
        asked = evolve(plan, steps=evolve(whole.steps, total=total))
        assert why in _at_its_end(asked) and bool(why) == bool(_at_its_end(asked))
    with pytest.raises(PlanChanged) as caught:
        execute(asked, manifest, Interrupting(*NEVER))
    assert _accept(asked, caught.value, ("steps",))
    events = Interrupting(*NEVER)
    assert run(asked, manifest, events) == 0
    assert "going on from step 4 of 7" in events.texts
    assert_equal(whole, asked)
    assert lock.read(lock_path(Path(asked.run_folder))).digest == asked.digest


def arguments(plan: Plan, decay: float) -> dict[str, object]:
    return {**plan.optimizer.arguments, "weight_decay": decay}
