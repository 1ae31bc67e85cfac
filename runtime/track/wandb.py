"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from runtime.track.base import Opening, numbers, settings


class Wandb:
    """A run of the project; one that goes on is the same run there, by its id."""

    def __init__(self, opening: Opening) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=opening.plan.track_project,
            name=opening.plan.name,
            id=opening.id,
            resume="allow",
            config=settings(opening.plan),
            dir=str(opening.run_folder),
            settings=wandb.Settings(console="off"),  # the run has a log of its own
            **({"mode": "offline"} if opening.offline else {}),
        )

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Steps that it has heard of before it leaves out by itself."""
        self._run.log(numbers(values), step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Shown with the step's metrics."""
        self._run.log({f"samples/{name}": self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Waits until all has been sent."""
        self._run.finish()
