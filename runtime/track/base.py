"""What a tracker is, and what it is opened with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from attrs import frozen
from PIL import Image

from compiler.adapters import ADAPTERS
from compiler.plan import EVALUATION, Plan

OFFLINE = "HF_HUB_OFFLINE"  # set by `--offline`, and by people who want the same


class Tracker(Protocol):
    """One destination. `step` is the number of updates done."""

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One optimizer step's metrics."""
        ...

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """One validation picture."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


@frozen(kw_only=True)
class Opening:
    """What a tracker is opened with."""

    plan: Plan
    run_folder: Path
    done: int  # steps done before
    id: str  # 32 hexadecimal digits, the same whenever this run goes on
    offline: bool  # no network may be asked


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What of a step's metrics can be plotted, under the names that all trackers show."""
    return {
        name if name.startswith(EVALUATION) else f"train/{name}": value
        for name, value in values.items()
        if name != "step" and isinstance(value, int | float)
    }


def settings(plan: Plan) -> dict[str, str | int | float]:
    """What services list of a run, to tell runs apart by."""
    found: dict[str, str | int | float] = {
        "plan": plan.digest,
        "name": plan.name,
        "seed": plan.seed,
        "family": plan.model.family,
        "base": plan.model.base,
        "method": plan.adapter.kind if plan.adapter else "full fine-tune",
        "compute": plan.precision.compute,
        "trained": plan.precision.trained,
        "steps": plan.steps.total,
        "steps_per_epoch": plan.steps.per_epoch,
        "samples_per_epoch": plan.steps.samples_per_epoch,
        "accumulate": plan.steps.accumulate,
        "optimizer": plan.optimizer.name,
        "lr": plan.optimizer.lr,
        "schedule": plan.schedule.name,
        "warmup": plan.schedule.warmup,
        "shift": plan.objective.shift,
        "sampling": plan.objective.sampling,
        "max_grad_norm": plan.max_grad_norm,
        "device": plan.device,
    }
    if plan.adapter:
        row = ADAPTERS[plan.adapter.kind]
        sizes = {"rank": plan.adapter.rank, "alpha": plan.adapter.alpha}
        found |= sizes if row.ranked else {}
        found |= {"block_size": plan.adapter.block_size} if plan.adapter.block_size else {}
    return found
