"""How fast this machine was: a small file of measured speeds, for the next plans. No torch.

    speeds.json     {"format": 2, "speeds": {KEY: {"flops_per_second": ..., "steps": ...}}}

Keys are those of `compiler.costs`. Deleting the file costs only the accuracy of estimates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from compiler.costs import device_key, device_name, step_key, train_flops
from compiler.machine import Machine
from compiler.plan import Plan
from compiler.site import Speed
from runtime.files import write_whole

FORMAT = 2  # 1: of all devices of a run together
SPEEDS = "speeds.json"
"""Its name in the user's cache folder."""
FEWEST = 5
"""Steps that make a measurement; the first of a run, which warms up, is not among them."""
METRICS = "metrics.jsonl"


def read(path: Path) -> dict[str, Speed]:
    """What `path` holds; nothing where it is missing, damaged or of another format."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            return {}
        return {str(key): _speed(row) for key, row in tree["speeds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _speed(row: Mapping[str, float]) -> Speed:
    speed = Speed(flops_per_second=float(row["flops_per_second"]), steps=int(row["steps"]))
    if not 0 < speed.flops_per_second < float("inf"):
        raise ValueError("no speed")
    return speed


def remember(path: Path, plan: Plan, machine: Machine) -> bool:
    """Keep what the run of `plan` measured; False if it measured nothing. Raises OSError."""
    speed = measured(plan)
    if speed is None:
        return False
    name = device_name(plan.device, machine)
    known = read(path) | {step_key(plan, name): speed, device_key(plan, name): speed}
    rows = {
        key: {"flops_per_second": row.flops_per_second, "steps": row.steps}
        for key, row in sorted(known.items())
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"format": FORMAT, "speeds": rows}, indent=1) + "\n")
    return True


def measured(plan: Plan) -> Speed | None:
    """The speed of each device in the run in the plan's folder, by the seconds of its steps."""
    seconds = step_seconds(Path(plan.run_folder) / METRICS)[1:]
    flops = train_flops(plan) / plan.steps.ranks / plan.steps.total
    if len(seconds) < FEWEST or not flops or not fmean(seconds):
        return None
    return Speed(flops_per_second=flops / fmean(seconds), steps=len(seconds))


def step_seconds(path: Path) -> list[float]:
    """Seconds of each step that the run's metrics tell of, in their order."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(float(json.loads(line)["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue  # the line that a killed run was writing
    return found
