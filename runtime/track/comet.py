"""Comet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from runtime.track.base import Opening, numbers, settings


class Comet:
    """An experiment of the project; one that goes on is found by its key."""

    def __init__(self, opening: Opening) -> None:
        import comet_ml

        self._experiment = comet_ml.start(
            project_name=opening.plan.track_project,
            experiment_key=opening.id,
            mode="create" if opening.offline else "get_or_create",
            online=not opening.offline,
            # What it gathers by itself (source code, command line, output) is nobody's wish here.
            experiment_config=comet_ml.ExperimentConfig(
                name=opening.plan.name,
                log_code=False,
                log_git_metadata=False,
                log_git_patch=False,
                parse_args=False,
                auto_output_logging=False,
                offline_directory=str(opening.run_folder / "comet"),
            ),
        )
        self._experiment.log_parameters(settings(opening.plan))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One point for each number."""
        self._experiment.log_metrics(numbers(values), step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Under the prompt's name, at its step."""
        self._experiment.log_image(image, name=name, step=step)

    def close(self) -> None:
        """Waits until all has been sent."""
        self._experiment.end()
