"""Goes on with the next rung of the ladder when a device ran out of memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve

from compiler import lock
from compiler.plan import Plan, lock_path
from tuner.compiling import compile_here
from tuner.plan_memory import peak
from tuner.screen import err

if TYPE_CHECKING:
    from runtime.errors import OutOfMemory
    from tuner.run import Job

RUNG = "rung.json"
"""In a run folder: the overrides with which the run went down the ladder."""
CHANGES = ("steps.micro_batch", "model.components")
"""What another rung may change of a plan that a run has begun with: an adapter on a base in fewer
bits, and sums in parts, go on from the weights that are there."""


def next_rung(job: Job, error: OutOfMemory) -> Job | None:
    """The job with the next rung, ready to go on; None if the recipe does not want it, or there is
    none. What is said goes to the screen."""
    if job.plan.memory.on_oom != "next-rung" or job.path is None:
        return None
    top = peak(job.plan)
    if top is None:
        return None
    lower = [
        f'memory.budget="{top.device_bytes - 1} B"',  # less than what was too much
        f'train.optimizer.name="{job.plan.optimizer.name}"',  # its state is there
    ]
    overrides = [*job.overrides, *lower]
    compiled = compile_here(job.path, overrides)
    if compiled.plan is None or compiled.manifest is None:
        return None
    differ = [key for key, _, _ in lock.changes(job.plan, compiled.plan)]
    if not all(key.startswith(CHANGES) for key in differ):
        return None
    err(f"{error.message}\ngoing on with the next rung: {_words(job.plan, compiled.plan)}")
    _keep(compiled.plan, lower)
    return evolve(job, plan=compiled.plan, outlook=compiled.outlook, overrides=tuple(overrides))


def gone_down(plan: Plan | None) -> list[str]:
    """The overrides with which the begun run of `plan` went down the ladder; none where it did
    not."""
    if plan is None or plan.memory.on_oom != "next-rung":
        return []
    try:
        kept = json.loads((Path(plan.run_folder) / RUNG).read_text(encoding="utf-8"))
        return [str(each) for each in kept["overrides"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _keep(plan: Plan, overrides: Sequence[str]) -> None:
    """The run folder's plan is the new one from now on, also when the run is started again."""
    from runtime.files import write_whole

    path = lock_path(Path(plan.run_folder))
    if path.exists():
        write_whole(path.parent / RUNG, json.dumps({"overrides": list(overrides)}) + "\n")
        write_whole(path, lock.dumps(plan))


def _words(old: Plan, new: Plan) -> str:
    """What the new plan does otherwise."""
    before, after = (next((r for r in p.memory.ladder if r.chosen), None) for p in (old, new))
    if before is None or after is None:
        return "less memory"
    changed = [f"{k} = {v}" for k, v in after.settings.items() if v != before.settings.get(k)]
    return ", ".join(changed) or "less memory"
