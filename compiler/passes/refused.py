"""Where a recipe is to blame for a model that the simulation could not build."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from compiler.adapters import rule_of
from compiler.diagnostics import choices
from compiler.draft import Draft
from compiler.schema import AdapterRecipe
from compiler.source import Part
from compiler.spans import KeyPath

QUOTED = re.compile(r"`([^`]+)`")


class Blame(NamedTuple):
    """What of the recipe is to be marked, and what would be right there."""

    place: KeyPath
    help: str
    of: Part = "value"


def refused(draft: Draft, why: str) -> None:
    """The model can't be built, or a pattern of the adapter matches nothing of it."""
    blame = Blame(("model", "base"), "a base whose configuration is as its publisher left it")
    adapter, quoted = draft.recipe.adapter, QUOTED.findall(why)
    name = quoted[0] if quoted else ""
    if adapter is not None and draft.model is not None:
        if most := re.search(r"rank may be at most (\d+)", why):
            blame = _of_rank(draft, name, int(most[1]), why[most.end() :])
        elif "block_size may be" in why:
            key = "block_size" if draft.given(("adapter", "block_size")) else "kind"
            blame = Blame(("adapter", key), f"block_size{why.rpartition('block_size')[2]}")
        elif name and draft.adapter is not None and name == draft.adapter.start:
            sets = choices(tuple(draft.model.family.target_sets))
            help = f"name its layers in `targets`; named sets of this family: {sets}"
            blame = Blame(("adapter", "from"), help)
        elif name == "train_norm":
            blame = Blame(("adapter", name), f"leave `{name}` out")
        elif name:
            sets = choices(tuple(draft.model.family.target_sets))
            meant = re.search(r"; `([^`]+)` matches \d+$", why)
            blame = _of_pattern(adapter, name, meant[1] if meant else "", sets) or blame
    draft.error("model-refused", blame.place, why, help=blame.help, of=blame.of)


def _of_pattern(adapter: AdapterRecipe, name: str, meant: str, sets: str) -> Blame | None:
    """Where the pattern `name` stands, and the one that is `meant`, if any is near; `sets` are the
    family's."""
    for key in ("targets", "exclude", "ranks", "alphas"):
        stated = getattr(adapter, key)
        if name not in (key, stated) and name not in stated:
            continue
        place: KeyPath = ("adapter", key)
        help = "patterns are matched with whole names"
        if meant:
            help = json.dumps(meant) + (f" = {stated[name]}" if isinstance(stated, dict) else "")
        elif key == "targets":
            help = f"named sets of this family: {sets}"
        if isinstance(stated, dict) and name in stated:
            return Blame((*place, name), help, "key")
        if not isinstance(stated, str) and name in stated:
            return Blame((*place, list(stated).index(name)), help)
        return Blame(place, help)
    return None


def _of_rank(draft: Draft, module: str, most: int, where: str) -> Blame:
    """Where the rank of `module` stands, and one that it has; `where` may quote patterns of all
    the layers that have no more."""
    assert draft.adapter is not None
    rule = rule_of(draft.adapter, module)
    if rule is not None:
        return Blame(("adapter", "ranks", rule.pattern), f"{json.dumps(rule.pattern)} = {most}")
    help, patterns = f"rank = {most}", QUOTED.findall(where)
    if patterns and not draft.adapter.ranks:
        rows = ", ".join(f"{json.dumps(pattern)} = {most}" for pattern in patterns)
        help += f", or ranks = {{ {rows} }}"
    return Blame(("adapter", "rank" if draft.given(("adapter", "rank")) else "init"), help)
