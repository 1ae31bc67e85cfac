"""Bases that were distilled into few steps, which training undoes."""

from __future__ import annotations

from compiler.draft import Draft, ModelFacts


def judge_base(draft: Draft, facts: ModelFacts) -> None:
    """Warn of a base that draws in few steps, and name the one to train in its place."""
    distilled = facts.distilled
    if distilled is None and not facts.few_steps:
        return
    steps = facts.inference_steps
    loads = "" if draft.recipe.adapter is None else "; its adapters can be loaded into this one"
    draft.warn(
        "distilled-base",
        ("model", "base"),
        f"this base was distilled into {steps} steps, and training undoes that: pictures in "
        f"{steps} steps get worse the longer it goes on",
        help=f'train what it was made from: base = "{distilled.undistilled}"{loads}'
        if distilled
        else "train the model that it was made from",
    )
