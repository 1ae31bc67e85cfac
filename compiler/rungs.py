"""What the ladder of savings of a plan has a say in: for those that go down it in a run."""

from __future__ import annotations

from compiler.families import FAMILIES
from compiler.plan import Plan, Rung


def encoders_of(plan: Plan) -> list[str]:
    """The names of the plan's text encoders."""
    names = FAMILIES[plan.model.family].text_encoders
    return [part.name for part in plan.model.components if part.name in names]


def apart(plan: Plan) -> frozenset[str]:
    """Phases that the ladder has no say in: encoding, once before the training."""
    return frozenset({*encoders_of(plan), "text", "latents"})


def needed(plan: Plan, phase: str) -> int:
    """Bytes that `phase` was planned to need; the most of the training where it is not known."""
    out = apart(plan)
    found = {p.name: p.device_bytes for p in plan.memory.phases if p.name not in out}
    return found.get(phase, max(found.values(), default=0))


def next_rung(plan: Plan) -> tuple[Rung, dict[str, str]] | None:
    """The rung below the chosen one, if the plan looked at it, and the settings, by their keys in
    the recipe, in which the two differ."""
    rungs = plan.memory.ladder
    place = next((number for number, rung in enumerate(rungs) if rung.chosen), len(rungs))
    if place + 1 >= len(rungs):
        return None
    here, below = rungs[place], rungs[place + 1]
    return below, {k: v for k, v in below.settings.items() if v != here.settings.get(k)}
