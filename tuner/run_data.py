"""What a run folder holds, read with care: what is missing or damaged is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from attrs import frozen

from compiler.keeping import is_finite
from compiler.lock import LockError, read
from compiler.plan import EVALUATION, Plan, lock_path

STEP = re.compile(r"step-(\d{6,})")
PICTURE = re.compile(r"(?P<name>.+)-(?P<width>\d+)x(?P<height>\d+)-(?P<seed>\d+)\.png")


@frozen(kw_only=True)
class Drawn:
    """One validation picture."""

    step: int
    name: str  # of the prompt
    width: int
    height: int
    seed: int
    path: Path


@frozen(kw_only=True)
class RunData:
    """A run as its folder tells it."""

    folder: Path
    plan: Plan | None
    plan_fault: str  # why there is no plan
    metrics: Sequence[Mapping[str, Any]]
    pictures: Sequence[Drawn]
    scores: Mapping[int, Mapping[str, Any]]  # by step
    measured: Mapping[str, Any]
    environment: Mapping[str, Any]
    recipe: str  # text of the recipe
    events: Sequence[
        Mapping[str, Any]
    ] = ()  # what the run said, with "at", "step", "level", "text"

    @property
    def name(self) -> str:
        """The plan's, else the folder's."""
        return self.plan.name if self.plan else self.folder.resolve().name

    @property
    def step(self) -> int:
        """Steps done, as far as the metrics tell."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def skipped(self) -> list[Mapping[str, Any]]:
        """Metrics of the steps that were passed over."""
        return [row for row in self.metrics if isinstance(row.get("skipped"), int)]

    def spikes(self, key: str) -> list[float]:
        """Steps at which a metric stood out."""
        return [float(row["step"]) for row in self.metrics if key in (row.get("spike") or ())]

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of one metric, where it is a finite number."""
        return [
            (float(row["step"]), float(row[key])) for row in self.metrics if is_finite(row.get(key))
        ]


def read_run(folder: Path) -> RunData:
    """All that `folder` holds."""
    plan, fault = _plan(folder)
    return RunData(
        folder=folder,
        plan=plan,
        plan_fault=fault,
        metrics=_metrics(folder / "metrics.jsonl"),
        pictures=_pictures(folder / "samples"),
        scores=_scores(folder / "samples"),
        measured=_object(folder / "measured.json"),
        environment=_object(folder / "environment.json"),
        recipe=_text(folder / "recipe.toml"),
        events=_events(folder / "events.jsonl"),
    )


def _plan(folder: Path) -> tuple[Plan | None, str]:
    try:
        return read(lock_path(folder)), ""
    except LockError as error:
        return None, str(error)


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The rows in order of their steps; of a step that was written twice, the later row."""
    rows: dict[int, dict[str, Any]] = {}
    for line in _text(path).splitlines():
        row = _parsed(line)
        if isinstance(row.get("step"), int):
            judged = any(key.startswith(EVALUATION) for key in row)  # a line of its own
            rows[row["step"]] = rows.get(row["step"], {}) | row if judged else row
    return [rows[step] for step in sorted(rows)]


def _events(path: Path) -> list[dict[str, Any]]:
    rows = map(_parsed, _text(path).splitlines())
    return [row for row in rows if isinstance(row.get("text"), str) and row["text"]]


def _pictures(samples: Path) -> list[Drawn]:
    found = []
    for path in sorted(samples.glob("step-*/*.png")):
        step, parts = STEP.fullmatch(path.parent.name), PICTURE.fullmatch(path.name)
        if step and parts:
            found.append(
                Drawn(
                    step=int(step[1]),
                    name=unquote(parts["name"]),
                    width=int(parts["width"]),
                    height=int(parts["height"]),
                    seed=int(parts["seed"]),
                    path=path,
                )
            )
    return found


def _scores(samples: Path) -> dict[int, Mapping[str, Any]]:
    found: dict[int, Mapping[str, Any]] = {}
    for path in sorted(samples.glob("step-*/scores.json")):
        step, content = STEP.fullmatch(path.parent.name), _object(path)
        if step and isinstance(content.get("mean"), int | float):
            found[int(step[1])] = content
    return found


def _object(path: Path) -> dict[str, Any]:
    return _parsed(_text(path))


def _parsed(text: str) -> dict[str, Any]:
    """A JSON object; {} for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
