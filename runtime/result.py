"""The result of a run: the trained weights as Diffusers loads them, whole or absent."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from runtime import checkpoints, files, result_step
from runtime.build import Built, state
from runtime.context import Context, is_sharded, kept, result_folder
from runtime.families.sana_sprint import few_steps
from runtime.loop import Trained
from runtime.methods import full, lora
from runtime.resume import load
from runtime.saving import best
from runtime.track import METRICS


def export_result(context: Context, built: Built, trained: Trained, step: int) -> None:
    """Write the result, that of `step`, whole. With an average it is the average, as in the
    pictures, or, where the plan saves both, the trained weights with the average beside them."""
    plan = context.plan
    method = full if plan.adapter is None else lora
    target = result_folder(plan)
    if has_result(context):
        return
    both = plan.ema is not None and plan.ema.save == "both"
    with context.clock.phase("export"), kept(trained):
        average, weights = _results(built, trained, both=both)
        if not context.ranks.leads:
            return
        result_step.note(context.folder, step)
        if both and plan.adapter is not None:  # first: the result's own folder says it is finished
            with files.partial_folder(target.with_name(f"{target.name}_ema")) as place:
                method.export(built, plan.model, context.family, place, weights=average)
        with files.partial_folder(target) as place:
            method.export(built, plan.model, context.family, place, weights=weights)
            if plan.sprint is not None:
                few_steps(plan.sprint, place)
            if both and plan.adapter is None and average is not None:
                component = f"{plan.model.trained_component}_ema"
                full.save_component(built.model, average, None, place / component)
                full.save_encoders(built, average, None, place, "_ema")


def has_result(context: Context) -> bool:
    """Whether the result is there already: rank 0 looks."""
    there = context.ranks.leads and result_folder(context.plan).is_dir()
    if not is_sharded(context):
        return there
    return context.ranks.told("there" if there else "") == "there"


def _results(
    built: Built, trained: Trained, *, both: bool
) -> tuple[Mapping[str, Tensor] | None, Mapping[str, Tensor]]:
    """The average, if there is one, and what the result holds: the trained weights where there is
    none, or where the plan saves `both`. Of a sharded model gathered, in rank 0."""
    average: Mapping[str, Tensor] | None = trained.ema.average if trained.ema else None
    shards, wanted = trained.shards, state(built)
    if shards is None:
        return average, wanted if average is None or both else average
    if average is not None:
        average = shards.gathered(average)
    return average, shards.gathered(wanted) if average is None or both else average


def go_back(context: Context, built: Built, trained: Trained) -> int | None:
    """Take up the best checkpoint, for the result, and return its step; None where the result is
    there, or no checkpoint is the best."""
    if has_result(context):
        return None
    rules, root = context.plan.checkpoints, context.folder / "checkpoints"
    found = best(root, rules, context.folder / METRICS)
    if (word := context.ranks.told("" if found is None else str(found))) == "":
        context.events.message(f"no checkpoint has a {rules.best}: the last is taken", "warning")
        return None
    step = int(word)
    load(checkpoints.folder_of(root, step), built, trained)
    context.events.message(f"the result is that of step {step}, the best by {rules.best}")
    return step
