"""Whether queries, keys and values may be computed by one product."""

from __future__ import annotations

from compiler.adapters import ADAPTERS
from compiler.draft import Draft
from compiler.spans import KeyPath

FUSED: KeyPath = ("speed", "fused_projections")


def resolve_projections(draft: Draft) -> bool:
    """What the recipe asks for, refused where something that it needs is not there."""
    asked = draft.recipe.speed.fused_projections
    draft.decide(FUSED, asked)
    reason = _unfit(draft) if asked else ""
    if reason:
        draft.error(
            "conflict",
            FUSED,
            f"projections can't be fused: {reason}",
            help="leave `fused_projections` out",
        )
    return asked


def _unfit(draft: Draft) -> str:
    assert draft.model is not None
    recipe, adapter = draft.recipe, draft.adapter
    if recipe.speed.compile == "regional":
        return "a compiled block knows its layers one by one"
    if adapter is not None and ADAPTERS[adapter.kind].turns_input:
        return f"{ADAPTERS[adapter.kind].title} gives each of them another input"
    kind = draft.quantize.get(draft.model.family.trained_component, "none")
    if kind != "none":
        return f"weights in {kind} are turned back layer by layer"
    offload = recipe.memory.offload
    if not isinstance(offload, str) and offload.blocks not in ("auto", 0):
        return "weights that wait on the host are moved one by one"
    return ""
