"""Goes on with the next rung of the ladder when a device ran out of memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import asdict, evolve, frozen

from compiler import lock, rungs
from compiler.plan import Plan, lock_path
from runtime.folder import RUNG
from tuner.compiling import compile_here
from tuner.plan_memory import peak
from tuner.screen import err

if TYPE_CHECKING:
    from runtime.errors import OutOfMemory
    from tuner.run import Job

BATCHES = "steps.micro_batch"
"""With the bits of the base, what another rung may change of a plan that a run has begun with: an
adapter on a base in fewer bits, and sums in parts, go on from the weights that are there."""


@frozen(kw_only=True)
class Lower:
    """How the recipe is compiled for less memory than its own plan needs."""

    overrides: tuple[str, ...]
    train_below: int  # bytes, see `compile_file`


def next_rung(job: Job, error: OutOfMemory) -> Job | None:
    """The job with the next rung, ready to go on; None if the recipe does not want it, or there is
    none. What is said goes to the screen."""
    plan, top = job.plan, peak(job.plan)
    if plan.memory.on_oom != "next-rung" or job.path is None or top is None:
        return None
    if error.phase in rungs.apart(plan) or error.on_host:  # the ladder has no say there
        return None
    too_much = rungs.needed(plan, error.phase)
    lower = Lower(
        overrides=(
            f'memory.budget="{top.device_bytes} B"',  # the other phases need what they did
            f'train.optimizer.name="{plan.optimizer.name}"',  # its state is there
            *_encoders(plan),  # embeddings are there
        ),
        train_below=too_much - 1,
    )
    overrides = (*job.overrides, *lower.overrides)
    compiled = compile_here(job.path, overrides, train_below=lower.train_below)
    if compiled.plan is None or compiled.manifest is None:
        return None
    if not _goes_on(plan, compiled.plan) or rungs.needed(compiled.plan, error.phase) >= too_much:
        return None
    err(f"{error.message}\ngoing on with the next rung: {_words(plan, compiled.plan)}")
    _keep(compiled.plan, lower)
    return evolve(job, plan=compiled.plan, outlook=compiled.outlook, overrides=overrides)


def _encoders(plan: Plan) -> list[str]:
    """Overrides that keep the text encoders as they are."""
    kept = {part.name: part.quantize for part in plan.model.components}
    return [f'model.{name}.quantize="{kept[name]}"' for name in rungs.encoders_of(plan)]


def _goes_on(old: Plan, new: Plan) -> bool:
    """Whether `new` trains in another way than `old`, and what `old` has trained can be gone on
    with."""
    bits = f"model.components[{old.model.trained_component}].quantize"
    differ = [key for key, _, _ in lock.changes(old, new)]
    fit = all(key == BATCHES or key.startswith(bits) for key in differ)
    return fit and bool(differ or old.memory.layout != new.memory.layout)


def gone_down(plan: Plan | None) -> Lower | None:
    """With what the begun run of `plan` went down the ladder; None where it did not."""
    if plan is None or plan.memory.on_oom != "next-rung":
        return None
    try:
        kept = json.loads((Path(plan.run_folder) / RUNG).read_text(encoding="utf-8"))
        overrides = tuple(str(each) for each in kept["overrides"])
        return Lower(overrides=overrides, train_below=int(kept.get("train_below", 0)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _keep(plan: Plan, lower: Lower) -> None:
    """The run folder's plan is the new one from now on, also when the run is started again."""
    from runtime.files import write_whole

    path = lock_path(Path(plan.run_folder))
    if path.exists():
        write_whole(path.parent / RUNG, json.dumps(asdict(lower)) + "\n")
        write_whole(path, lock.dumps(plan))


def _words(old: Plan, new: Plan) -> str:
    """What the new plan does otherwise."""
    before, after = (next((r for r in p.memory.ladder if r.chosen), None) for p in (old, new))
    if before is None or after is None:
        return "less memory"
    changed = [f"{k} = {v}" for k, v in after.settings.items() if v != before.settings.get(k)]
    return ", ".join(changed) or "less memory"
