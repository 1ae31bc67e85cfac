"""The loss of held-out images: when it is measured, at which noise levels, of which weights."""

from __future__ import annotations

from compiler import plan
from compiler.data.manifest import Manifest
from compiler.draft import Draft
from compiler.passes.training import in_steps
from compiler.spans import KeyPath

WHERE: KeyPath = ("evaluation",)


def resolve_evaluation(draft: Draft) -> None:
    """Fill in `draft.evaluation`; it stays None where nothing is held out, or by the recipe."""
    recipe = draft.recipe.evaluation
    if draft.manifest is None or draft.steps is None:
        return
    judged = draft.manifest.held_out
    if judged is None:
        _nothing_to_judge(draft)
        return
    every = in_steps(draft, (*WHERE, "every"), recipe.every, draft.steps)
    draft.decide((*WHERE, "every"), f"{every} steps")
    if every > draft.steps.total and draft.given((*WHERE, "every")):
        draft.warn(
            "interval-too-long",
            (*WHERE, "every"),
            f"every {every} steps in a run of {draft.steps.total}: no loss is measured between the "
            "start and the end",
            help='every = "1 epoch"',
        )
    weights = judged_weights(draft, (*WHERE, "weights"), recipe.weights)
    draft.decide((*WHERE, "timesteps"), recipe.timesteps)
    if len(set(recipe.timesteps)) < len(recipe.timesteps):
        draft.error("duplicate-id", (*WHERE, "timesteps"), "a quantile is given twice")
    draft.evaluation = plan.Evaluation(
        every=every,
        timesteps=tuple(float(each) for each in recipe.timesteps),
        weights=weights,
        manifest=judged.digest,
        groups=_groups(draft, judged),
    )


def judged_weights(draft: Draft, where: KeyPath, asked: str) -> plan.Judged:
    """Those that are judged or draw, where `asked` is "auto", "average" or "trained"."""
    if asked == "average" and draft.ema is None:
        draft.error(
            "no-effect",
            where,
            "no average of the weights is kept: there is no [train.ema]",
            help='weights = "trained"',
        )
    averaged = draft.ema is not None
    wanted = averaged if asked == "auto" else asked == "average"
    found: plan.Judged = "average" if wanted else "trained"
    why = "an average is kept" if averaged else "no average is kept"
    draft.decide(where, found, by="decided", why=why)
    return found


def _groups(draft: Draft, judged: Manifest) -> tuple[plan.HeldOut, ...]:
    """The held-out images of each source and size, in batches as large as those in which the
    source trains, or would; without gradients they need less."""
    ids = (source.id for source in draft.sources)
    sizes = dict(zip(ids, draft.batch_sizes, strict=True))
    return tuple(
        plan.HeldOut(
            source=judged.folders[members.source].id,
            width=members.width,
            height=members.height,
            images=len(members.samples),
            batch_size=sizes[judged.folders[members.source].id],
        )
        for members in judged.buckets
    )


def _nothing_to_judge(draft: Draft) -> None:
    """Settings of a measurement that is never made."""
    table = draft.located.data.get("evaluation", {})
    stated = [key for key in table if isinstance(table, dict)]
    if draft.recipe.evaluation.every.is_off:
        stated = [key for key in stated if key != "every"]
        why = "is never measured"
    else:
        why = "has nothing to be measured on: no source holds images out"
    if stated:
        draft.error(
            "no-effect",
            (*WHERE, stated[0]),
            f"`{stated[0]}` has no effect: the evaluation loss {why}",
            help="holdout = 0.05 in [[data.source]]",
            of="key",
        )
