"""`tuner diff A B`: what two recipes, saved plans or runs do differently."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from compiler import lock
from compiler.plan import Plan, lock_path
from compiler.secrets import shown_address
from tuner.exits import DONE, REFUSED
from tuner.layout import columns
from tuner.screen import err, out

FORMAT_VERSION = 1
LOCK_SUFFIX = ".lock.toml"
BESIDE = ("memory.budget", "memory.activation_checkpointing")  # decisions that no digest holds
ABSENT = "-"
LONGEST = 60  # characters of a value; `--json` has all of it
FOLDED = "model.configs."  # another base differs in all of these
FEW = 8
_DIGEST = re.compile(r"[0-9a-f]{64}")
MARKS = {True: "!", False: " "}


@frozen(kw_only=True)
class Difference:
    """One entry of the plan; None where a plan has none."""

    key: str
    old: Any
    new: Any
    alters_trajectory: bool


def show_difference(old: Path, new: Path, *, as_json: bool = False) -> int:
    """The differences on stdout; 0 whether or not there are any, 2 if a plan can't be had."""
    plans = [_plan(path) for path in (old, new)]
    left, right = plans
    if left is None or right is None:
        return REFUSED
    found = differences(left, right)
    if as_json:
        rows = [
            {"key": d.key, "old": d.old, "new": d.new, "alters_trajectory": d.alters_trajectory}
            for d in found
        ]
        head = {"format_version": FORMAT_VERSION, "old": str(old), "new": str(new)}
        same = {"equal": not found, "same_trajectory": not any(d.alters_trajectory for d in found)}
        out(json.dumps(head | same | {"differences": rows}, indent=2))
    else:
        out(text(found, str(old), str(new)))
    return DONE


def differences(old: Plan, new: Plan) -> list[Difference]:
    """What differs, in the plan's order; what alters the trained weights is marked."""
    rows = lock.changes(old, new)
    for key in BESIDE:
        left, right = _decided(old, key), _decided(new, key)
        rows += [(key, left, right)] if left and right and left != right else []
    return [
        Difference(
            key=key,
            old=_fit_to_show(key, left),
            new=_fit_to_show(key, right),
            alters_trajectory=lock.alters(new, key),
        )
        for key, left, right in rows
    ]


def _fit_to_show(key: str, value: Any) -> Any:
    """A value of the plan without a webhook's address, which is a secret."""
    if key == "publish.webhook" and isinstance(value, str):
        return shown_address(value)
    if key == "publish" and isinstance(value, dict):
        return {**value, "webhook": shown_address(str(value.get("webhook", "")))}
    return value


def text(found: Sequence[Difference], old: str, new: str) -> str:
    """The differences as lines of at most 80 columns, where values allow."""
    if not found:
        return f"{old} and {new} do the same"
    folded = [d for d in found if d.key.startswith(FOLDED)]
    shown = [d for d in found if d not in folded or len(folded) <= FEW]
    rows = [(f"{MARKS[d.alters_trajectory]} {d.key}", _values(d)) for d in shown]
    if len(shown) < len(found):
        rows.append((f"{MARKS[True]} {FOLDED}*", f"{len(folded)} entries (--json has them)"))
    count = sum(d.alters_trajectory for d in found)
    verdict = (
        f"{count} of {len(found)} alter the trained weights (!)"
        if count
        else f"{len(found)} differ, none of which alters the trained weights"
    )
    return "\n".join([f"{old} -> {new}", "", *columns(rows, indent=0), "", verdict])


def _values(difference: Difference) -> str:
    old, new = difference.old, difference.new
    if old is None and isinstance(new, dict):
        return "only in the second"
    if new is None and isinstance(old, dict):
        return "only in the first"
    return f"{value_text(old)} -> {value_text(new)}"


def value_text(value: Any) -> str:
    """A value of a plan in few characters."""
    from compiler.diagnostics import shown
    from compiler.draft import spelt

    if value is None:
        return ABSENT
    if isinstance(value, dict) or (isinstance(value, list) and any(map(_is_nested, value))):
        value = json.dumps(value)
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value[:12]
    return shown(spelt(value) or '""', LONGEST)


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def _decided(plan: Plan, key: str) -> str:
    """A decision's value, if it was one: what was not simulated is not compared."""
    found = next((d for d in plan.decisions if d.key == key), None)
    return "" if found is None or found.value == "not used" else found.value


def _plan(path: Path) -> Plan | None:
    """The plan of a run's folder, a saved plan or a recipe; None after telling why not."""
    if path.is_dir() or path.name.endswith(LOCK_SUFFIX):
        place = lock_path(path) if path.is_dir() else path
        if not place.is_file():
            what = f"holds no {place.name}" if path.is_dir() else "does not exist"
            err(f"error: `{path}` is no plan: it {what}")
            err("help: give a recipe, a plan.lock.toml, or the folder of a run")
            return None
        try:
            return lock.read(place)
        except lock.LockError as error:
            err(f"error: `{path}` is no plan: {error}")
            err("help: give a recipe, a plan.lock.toml, or the folder of a run")
            return None
    from tuner.compiling import compile_here, show_diagnostics

    compiled = compile_here(path, (), simulate=False)
    errors = [fault for fault in compiled.diagnostics if fault.severity == "error"]
    show_diagnostics(errors, compiled, str(path))
    return compiled.plan
