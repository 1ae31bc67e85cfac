"""Two processes that train text encoders together do as one with the same global batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from attrs import evolve

from compiler.adapters import CLIP_TARGETS
from compiler.families import FAMILIES
from compiler.plan import TextTraining
from runtime.events import Silent
from runtime.execute import execute
from tests.runtime.plans import LORA, draw_data, source_of, tiny_plan
from tests.runtime.test_ranks_run import assert_close, start
from tests.runtime.tiny import make_tiny
from tests.runtime.whole_runs import wait

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


@pytest.mark.slow
def test_two_ranks_stop_training_the_encoders_together(tmp_path: Path) -> None:
    make_tiny("sd3", tmp_path / "sd3")
    draw_data(tmp_path / "dog", ((70, 70), (70, 70), (140, 70), (64, 64), (70, 140)))
    source = source_of(tmp_path / "dog", repeats="1.5", dropout=0.3)
    facts = TextTraining(
        encoders=FAMILIES["sd3"].trainable_encoders,
        adapter=evolve(LORA, dropout=0.2, targets=CLIP_TARGETS["attention"]),
        lr=5e-4,
        until=3,
    )
    given = ("sd3", tmp_path / "sd3", [source], tmp_path / "alone")
    alone, manifest = tiny_plan(
        *given,
        steps=5,
        accumulate=2,
        adapter=evolve(LORA, dropout=0.2),
        cache_folder=str(tmp_path / "cache"),
        text_training=facts,
    )
    together = evolve(
        alone,
        name="together",
        run_folder=str(tmp_path / "together"),
        steps=evolve(alone.steps, ranks=2, accumulate=1),
    )
    assert execute(alone, manifest, Silent()).status == "finished"
    assert [wait(process) for process in start([(together, manifest)], 2)] == [0, 0]
    assert_close(together, alone, 1e-4)
