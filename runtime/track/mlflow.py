"""MLflow: a server, or a folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from runtime import files
from runtime.errors import MachineUnfit
from runtime.track.base import Opening, numbers, settings

LOCAL = frozenset({"", "file", "sqlite"})


class MlFlow:
    """A run of the experiment that is called like the project."""

    def __init__(self, opening: Opening) -> None:
        """Raises MachineUnfit if its server may not be asked."""
        import mlflow
        from mlflow.entities import Metric, Param

        address = str(mlflow.get_tracking_uri())
        if opening.offline and urlsplit(address).scheme not in LOCAL:
            raise MachineUnfit(
                f"tracker `mlflow` asks the network ({address}), which --offline forbids",
                help="set MLFLOW_TRACKING_URI to a local folder, or run without --offline",
            )
        self._metric = Metric
        self._client = mlflow.MlflowClient()
        place = opening.run_folder / "trackers" / "mlflow-run"
        self._run = _known(self._client, place)
        if self._run:
            self._client.set_terminated(self._run, status="RUNNING")
            return
        made = self._client.create_run(
            self._experiment(opening.plan.track_project), run_name=opening.plan.name
        )
        self._run = made.info.run_id
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(place, self._run)
        given = [Param(key, str(value)) for key, value in settings(opening.plan).items()]
        self._client.log_batch(self._run, params=given)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """All numbers of a step in one request."""
        now = int(time.time() * 1000)
        points = [self._metric(key, value, now, step) for key, value in numbers(values).items()]
        self._client.log_batch(self._run, metrics=points)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """A file of the run, below `samples/`."""
        self._client.log_image(self._run, image, f"samples/{name}/step-{step:06d}.png")

    def close(self) -> None:
        """The run has ended."""
        self._client.set_terminated(self._run)


def _known(client: Any, place: Path) -> str:
    """The id of the run that was begun before, if there still is one; else ""."""
    try:
        run = place.read_text(encoding="utf-8")
    except OSError:
        return ""
    try:
        client.get_run(run)
    except Exception:  # of its own kinds; another server does not know it
        return ""
    return run
