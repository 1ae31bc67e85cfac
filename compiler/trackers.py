"""Who can be told of a run's metrics: facts that the plan and the run share."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen


@frozen(kw_only=True)
class TrackerFacts:
    """One tracker. Its extra is called as it is: `pip install tuner[NAME]`."""

    name: str
    title: str
    package: str
    module: str  # what is imported
    service: bool  # it may ask a network, so it is told in the background and again if it fails
    login: str = ""  # how it learns who you are, in a sentence


TRACKERS: Mapping[str, TrackerFacts] = {
    row.name: row
    for row in (
        TrackerFacts(
            name="tensorboard",
            title="TensorBoard",
            package="tensorboard",
            module="torch.utils.tensorboard",
            service=False,
        ),
        TrackerFacts(
            name="wandb",
            title="Weights & Biases",
            package="wandb",
            module="wandb",
            service=True,
            login="set WANDB_API_KEY or run `wandb login`; WANDB_MODE=offline asks for neither",
        ),
        TrackerFacts(
            name="comet",
            title="Comet",
            package="comet-ml",
            module="comet_ml",
            service=True,
            login="set COMET_API_KEY or run `comet login`",
        ),
        TrackerFacts(
            name="mlflow",
            title="MLflow",
            package="mlflow-skinny",
            module="mlflow",
            service=True,
            login="set MLFLOW_TRACKING_URI to the address of its server (a local database needs "
            "the package `mlflow`)",
        ),
        TrackerFacts(
            name="swanlab",
            title="SwanLab",
            package="swanlab",
            module="swanlab",
            service=True,
            login="set SWANLAB_API_KEY or run `swanlab login`; SWANLAB_MODE=local asks for neither",
        ),
    )
}
