"""The way down the ladder when a run was out of memory, with the compiler and a known memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from compiler.compile import Compiled
from compiler.plan import Plan
from runtime.errors import OutOfMemory
from tests.compiler.recipes import GPU, RECIPE, compiled, project
from tests.compiler.test_ladder import OPEN, Formula
from tuner import next_rung
from tuner.run import Job

MIB = 2**20
LARGER = RECIPE.replace("batch_size = 2", "batch_size = 4") + OPEN
ENCODER = '[model.text_encoder]\nquantize = "auto"\n'


def begun(
    folder: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, text: int, budget: int
) -> Job:
    """A job on a device with `budget` MiB, of which the text encoder needs `text`."""
    path = project(folder, recipe + '[memory]\non_oom = "next-rung"\n')
    first = f'memory.budget="{budget} MiB"'

    def here(path: Path, overrides: Any, train_below: int = 0) -> Compiled:
        return compiled(
            path, *overrides, machine=GPU, memory_model=Formula(text), train_below=train_below
        )

    monkeypatch.setattr(next_rung, "compile_here", here)
    found = here(path, [first])
    assert found.plan is not None and found.manifest is not None
    return Job(
        plan=found.plan, manifest=found.manifest, recipe=recipe, path=path, overrides=(first,)
    )


def train(plan: Plan) -> int:
    return next(p.device_bytes for p in plan.memory.phases if p.name == "train")


def bits(plan: Plan) -> dict[str, str]:
    return {part.name: part.quantize for part in plan.model.components}


@pytest.mark.parametrize("encoder", ["", ENCODER])
def test_it_goes_down_below_the_training_whatever_the_encoder_needs(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder, which needs most, has done its work: its embeddings stay what they are."""
    job = begun(tmp_path, monkeypatch, LARGER + encoder, text=1499, budget=1500)
    error, seen = OutOfMemory("no memory", "", "train"), [train(job.plan)]
    assert max(p.device_bytes for p in job.plan.memory.phases) == 1499 * MIB > seen[0]
    below = next_rung.next_rung(job, error)
    while below is not None:
        seen.append(train(below.plan))
        assert bits(below.plan)["text_encoder"] == bits(job.plan)["text_encoder"] == "none"
        assert below.plan.optimizer == job.plan.optimizer
        below = next_rung.next_rung(below, error)
    assert len(seen) > 3 and seen == sorted(set(seen), reverse=True)


def test_it_ends_where_nothing_of_the_training_is_left_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = LARGER.replace('[model.transformer]\nquantize = "auto"\n', ENCODER)
    job = begun(tmp_path, monkeypatch, fixed, text=1499, budget=1500)
    stated = ("activation_checkpointing=1", "offload=none", "micro_batch=4", "fused_backward=false")
    job = evolve(job, overrides=(*job.overrides, *(f"memory.{each}" for each in stated)))
    assert job.path is not None
    found = compiled(job.path, *job.overrides, machine=GPU, memory_model=Formula(1499))
    assert found.plan is not None and bits(found.plan)["text_encoder"] == "none"
    assert next_rung.next_rung(evolve(job, plan=found.plan), OutOfMemory("", "", "train")) is None


def test_encoding_is_on_no_rung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = begun(tmp_path, monkeypatch, LARGER + ENCODER, text=1499, budget=1500)
    for phase in ("text_encoder", "latents", "text"):
        assert next_rung.next_rung(job, OutOfMemory("", "", phase)) is None
    assert next_rung.next_rung(job, OutOfMemory("", "", "validation", on_host=True)) is None
    assert next_rung.next_rung(job, OutOfMemory("", "", "validation")) is not None


def test_what_it_was_lowered_by_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compiler import lock
    from compiler.plan import lock_path

    job = begun(tmp_path, monkeypatch, LARGER, text=50, budget=1500)
    assert next_rung.gone_down(job.plan) is None
    path = lock_path(Path(job.plan.run_folder))
    path.parent.mkdir(parents=True)
    path.write_text(lock.dumps(job.plan))
    below = next_rung.next_rung(job, OutOfMemory("", "", "train"))
    lower = next_rung.gone_down(job.plan)
    assert below is not None and lower is not None
    assert (*job.overrides, *lower.overrides) == below.overrides
    assert lower.train_below == train(job.plan) - 1
    assert lock.read(path).digest == below.plan.digest
