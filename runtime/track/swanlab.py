"""SwanLab."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from runtime.track.base import Opening, numbers, settings

ID_LENGTH = 21  # of an experiment's id


class SwanLab:
    """An experiment of the project; one that goes on is found by its id."""

    def __init__(self, opening: Opening) -> None:
        import swanlab

        self._swanlab = swanlab
        swanlab.init(
            project=opening.plan.track_project,
            experiment_name=opening.plan.name,
            id=opening.id[:ID_LENGTH],
            resume="allow",
            config=settings(opening.plan),
            logdir=str(opening.run_folder / "swanlab"),
            **({"mode": "offline"} if opening.offline else {}),
        )

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One point for each number."""
        self._swanlab.log(numbers(values), step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Under the prompt's name, at its step."""
        self._swanlab.log({f"samples/{name}": self._swanlab.Image(image)}, step=step)

    def close(self) -> None:
        """Waits until all has been sent."""
        self._swanlab.finish()
