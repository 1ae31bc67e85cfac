"""Where metrics go: `metrics.jsonl` always, trackers where the plan asks for them.

metrics.jsonl            one object a line, one line a step
tensorboard/             event files
trackers/id              by which services know the run again when it goes on
trackers/NAME.json       how far the service NAME was told
"""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from compiler.plan import Plan
from compiler.trackers import TRACKERS, TrackerFacts
from runtime import files
from runtime.errors import MachineUnfit, first_line
from runtime.events import Events
from runtime.track.background import Background
from runtime.track.base import OFFLINE, Opening, Tracker
from runtime.track.comet import Comet
from runtime.track.lines import METRICS, JsonLines, rows, truncate
from runtime.track.mlflow import MlFlow
from runtime.track.swanlab import SwanLab
from runtime.track.tensorboard import Board
from runtime.track.wandb import Wandb

__all__ = ["METRICS", "JsonLines", "Tracker", "check_trackers", "open_trackers", "rows", "truncate"]

OPENED_BY: Mapping[str, Callable[[Opening], Tracker]] = {
    "tensorboard": Board,
    "wandb": Wandb,
    "comet": Comet,
    "mlflow": MlFlow,
    "swanlab": SwanLab,
}


def check_trackers(plan: Plan) -> None:
    """Raise MachineUnfit if the package of one of the plan's trackers is missing."""
    for name in plan.track:
        facts = TRACKERS[name]
        try:
            importlib.import_module(facts.module)
        except ImportError as error:
            raise MachineUnfit(
                f"tracker `{name}` needs the package `{facts.package}`: {error}",
                help=f"pip install 'tuner[{name}]', or take it out of [track] to",
            ) from error


def open_trackers(plan: Plan, run_folder: Path, done: int, events: Events) -> list[Tracker]:
    """`metrics.jsonl` and the plan's trackers, for a run that has done `done` steps.

    Raises MachineUnfit if one of them is not there or refuses.
    """
    check_trackers(plan)
    found: list[Tracker] = [JsonLines(run_folder / METRICS, done)]
    try:
        for name in plan.track:
            found.append(_opened(TRACKERS[name], plan, run_folder, done, events))
    except BaseException:
        for tracker in found:
            tracker.close()
        raise
    return found


def _opened(
    facts: TrackerFacts, plan: Plan, run_folder: Path, done: int, events: Events
) -> Tracker:
    opening = Opening(
        plan=plan,
        run_folder=run_folder,
        done=done,
        id=_id(run_folder) if facts.service else "",
        offline=os.environ.get(OFFLINE, "") not in ("", "0"),
    )
    try:
        tracker = OPENED_BY[facts.name](opening)
    except MachineUnfit:
        raise
    except Exception as error:  # each service has its own kinds
        first = first_line(error)
        raise MachineUnfit(
            f"tracker `{facts.name}` can't be opened: {first}",
            help=f"{facts.login or 'see above'}; or take it out of [track] to",
        ) from error
    if not facts.service:
        return Background(facts.name, tracker, events)
    state = run_folder / "trackers" / f"{facts.name}.json"
    return Background(facts.name, tracker, events, state, missed=rows(run_folder / METRICS, done))


def _id(run_folder: Path) -> str:
    """The id by which services know this run, made when the first of them is opened."""
    place = run_folder / "trackers" / "id"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(place, uuid.uuid4().hex)
    return place.read_text(encoding="utf-8")
