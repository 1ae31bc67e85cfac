"""Bases that were distilled into few steps, which training undoes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compiler.draft import Draft, ModelFacts


def judge_base(draft: Draft, facts: ModelFacts) -> None:
    """Warn of a base that draws in few steps, and name the one to train in its place."""
    instead = undistilled(facts)
    if not instead and not facts.few_steps:
        return
    steps = facts.inference_steps
    loads = "" if draft.recipe.adapter is None else "; its adapters can be loaded into this one"
    draft.warn(
        "distilled-base",
        ("model", "base"),
        f"this base was distilled into {steps} steps, and training undoes that: pictures in "
        f"{steps} steps get worse the longer it goes on",
        help=f'train what it was made from: base = "{instead}"{loads}'
        if instead
        else "train the model that it was made from",
    )


def undistilled(facts: ModelFacts) -> str:
    """The hub id of what a distilled base was made from; "": it isn't distilled, or of no size that
    is known. A folder is told by what its index and its configuration say."""
    if facts.known is not None:
        return facts.known.undistilled
    if not facts.few_steps:
        return ""
    trained = facts.family.trained_component
    alike = (
        known.undistilled
        for known in facts.family.known
        if known.undistilled and _agree(known.configs[trained], facts.configs[trained])
    )
    return next(alike, "")


def _agree(known: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a folder's configuration says all that is known of a published one; it may say
    more, as Diffusers adds defaults."""
    return all(key in found and found[key] == value for key, value in known.items())
