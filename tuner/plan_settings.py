"""A plan's settings as lines: what differs from the defaults, what was filled in, who said so."""

from __future__ import annotations

import re
from pathlib import Path

from compiler.plan import Decision, Plan
from tuner.defaults import default_of, differs
from tuner.layout import pair, wrapped

MAX_DIFFERENT = 5  # keys that differ from their defaults and have a row of their own without -v
MAX_FILLED = 3
MATTERS = (  # what is filled in and shown without -v, the most telling first
    "memory.activation_checkpointing",
    "launch.device",
    "launch.strategy",
    "train.timesteps.shift",
    "precision.compute",
    "precision.trained",
    "adapter.targets",
    "data.resolution",
    "adapter.alpha",
    "text.max_length",
    "validation.sizes",
)
ALTERS = "alters the result"
EMPTY = '""'
PASS = "pass "  # sources of decisions that need nobody's name, only their reason
QUIET = ("default", "inherited")  # sources of what only -v shows
_PLACE = re.compile(r"(?P<file>.+):(?P<line>\d+)")


def different(plan: Plan, recipe: str, verbose: bool) -> list[str]:
    """Keys that the person set to something else than the default; of many, how many."""
    found = [
        (decision, default)
        for decision in plan.decisions
        if _given(decision)
        and (default := default_of(decision.key)) is not None
        and differs(decision.value, default)
    ]
    if not found:
        return []
    if len(found) > MAX_DIFFERENT and not verbose:
        return [f"differs from the defaults in {len(found)} keys (-v)"]
    lines = ["differs from the defaults"]
    for decision, default in found:
        words = f"{decision.key}  {default or EMPTY} -> {decision.value or EMPTY}"
        *above, last = wrapped(words, "  ~ ", " " * 6)
        lines += [*above, *pair(last, _source(decision, recipe))]
    return lines


def filled_in(plan: Plan, recipe: str, verbose: bool) -> list[str]:
    """Values that the compiler chose, with its reasons: those that matter; with -v, all values."""
    if verbose:
        return _rows("every setting", list(plan.decisions), recipe)
    chosen = [d for d in plan.decisions if not (_given(d) or d.source in QUIET)]
    telling = sorted((d for d in chosen if d.key in MATTERS), key=lambda d: MATTERS.index(d.key))
    loud = [d for d in chosen if ALTERS in d.why]  # never folded away
    shown = loud + [d for d in telling if d not in loud][:MAX_FILLED]
    more = len(chosen) - len(shown)
    head = "filled in" + (f", {more} more with -v" if more else "")
    return _rows(head, shown, recipe)


def _rows(head: str, decisions: list[Decision], recipe: str) -> list[str]:
    if not decisions:
        return []
    width = max(len(decision.key) for decision in decisions)
    lines = [head]
    for decision in decisions:
        reason = decision.why or _source(decision, recipe)
        if decision.why and not decision.source.startswith(PASS):
            reason = f"{_source(decision, recipe)}: {decision.why}"
        *above, last = wrapped(decision.value or EMPTY, f"  {decision.key:<{width}}  ", " " * 4)
        lines += above
        lines += (
            pair(last, reason) if len(reason) <= 76 else [last, *wrapped(reason, " " * 8, " " * 8)]
        )
    return lines


def where(plan: Plan, key: str, recipe: str) -> str:
    """Who gave the value of `key`; nothing where the plan does not say."""
    return next((_source(d, recipe) for d in plan.decisions if d.key == key), "")


def _given(decision: Decision) -> bool:
    """Whether a person stated the value: in a file, or on the command line."""
    return decision.source == "--set" or _PLACE.fullmatch(decision.source) is not None


def _source(decision: Decision, recipe: str) -> str:
    """Who gave a value, in short: `line 12` of the recipe itself, else the full name."""
    place = _PLACE.fullmatch(decision.source)
    if place and Path(place["file"]).name == Path(recipe).name:
        return f"line {place['line']}"
    return decision.source
