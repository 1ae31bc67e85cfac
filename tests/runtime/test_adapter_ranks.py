"""Several processes train each kind of adapter as one does: averaged, or sharing weights out."""

from __future__ import annotations

import sys

import pytest
from attrs import evolve

from compiler.adapters import LAYERED
from compiler.plan import Sharing
from runtime.events import Silent
from runtime.execute import execute
from tests.runtime.methods.test_kinds import adapter_of
from tests.runtime.test_ranks_run import assert_close, make, place, start
from tests.runtime.whole_runs import wait

__all__ = ["make", "place"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


@pytest.mark.slow
def test_ranks_train_as_one_process_does(make):
    jobs, pairs = [], []
    for number, kind in enumerate(LAYERED):
        together, alone, manifest = make("sana", "lora", 2, 1, kind, optimizer="sgd", steps=3)
        changes = {"init": "pissa"} if kind == "lora" else {}
        adapter = adapter_of(kind, "sana", **changes)
        alone = evolve(alone, adapter=adapter)
        execute(alone, manifest, Silent())
        for strategy in ("fsdp", "ddp")[: 1 + number % 2]:  # sums know no kinds: half are enough
            plan = evolve(
                together,
                adapter=adapter,
                sharing=Sharing(strategy=strategy),
                run_folder=f"{together.run_folder}-{strategy}",
            )
            jobs.append((plan, manifest))
            pairs.append((plan, alone))
    assert [wait(pid) for pid in start(jobs, 2)] == [0, 0]
    for together, alone in pairs:
        assert_close(together, alone, 1e-5)
