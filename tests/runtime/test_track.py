"""Metrics: one line a step, none doubled or missing after going on; TensorBoard's own reader.

Services are played by modules of their names that take down what they are asked.
"""

from __future__ import annotations

import json
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
from attrs import evolve
from PIL import Image

from runtime.errors import MachineUnfit
from runtime.track import JsonLines, open_trackers, truncate
from runtime.track.background import Background, sent
from runtime.track.base import OFFLINE, Opening, settings
from runtime.track.tensorboard import Board
from tests.runtime.test_loop import Recorder
from tests.tuner.examples import quickstart

RED = Image.new("RGB", (8, 6), (255, 0, 0))


def plan_with(*names):
    return evolve(quickstart(), track=names, track_project="zorps")


def opened(folder, *names, done=0, events=None):
    """What a run has open, `metrics.jsonl` first."""
    folder.mkdir(exist_ok=True)
    return open_trackers(plan_with(*names), folder, done, events or Recorder())


def opening(folder, done=0):
    return Opening(plan=quickstart(), run_folder=folder, done=done, id="", offline=False)


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_are_on_disk_at_once_and_go_on_without_doubles(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, 0)
    for step in range(1, 8):
        lines.metrics(step, {"loss": 1 / step})
        assert steps_of(path)[-1] == step
    lines.close()
    again = JsonLines(path, 4)
    assert steps_of(path) == [1, 2, 3, 4]
    again.metrics(5, {"loss": 0.5})
    again.close()
    assert steps_of(path) == [1, 2, 3, 4, 5]


def test_a_cut_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    truncate(path, 10)
    assert steps_of(path) == [1, 2]
    truncate(tmp_path / "absent", 3)
    assert not (tmp_path / "absent").exists()


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines, board = opened(tmp_path, "tensorboard")
    lines.close()
    for step in (1, 2, 3):
        board.metrics(step, {"loss": 1.0 / step, "epoch": 1, "names": ["a.jpg"]})
    board.picture(3, "dog", RED)
    board.close()
    resumed = Board(opening(tmp_path, 2))
    resumed.metrics(3, {"loss": 9.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 9.0),
    ]
    assert "train/names" not in events.Tags()["scalars"]


def test_tensorboard_picture(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(opening(tmp_path))
    board.picture(3, "dog", RED)
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    picture = events.Images("samples/dog")[0]
    assert (picture.width, picture.height, picture.step) == (8, 6, 3)


class Service:
    """Takes down calls as (name, arguments); shared by all fakes."""

    def __init__(self):
        self.calls = []
        self.failures = 0  # calls that still fail

    def note(self, call, /, *rest, **given):
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route to host")
        self.calls.append((call, rest, given))

    def noting(self, name):
        return lambda *rest, **given: self.note(name, *rest, **given)

    def named(self, name):
        return [(rest, given) for called, rest, given in self.calls if called == name]


@pytest.fixture
def service(monkeypatch):
    """Fakes of the four services' packages, at the edge that the trackers touch."""
    monkeypatch.delenv(OFFLINE, raising=False)
    made = Service()
    experiments, runs = {}, {}

    def module(name, **attributes):
        fake = ModuleType(name)
        vars(fake).update(attributes)
        monkeypatch.setitem(sys.modules, name, fake)
        return fake

    def run(*names):
        return SimpleNamespace(**{name: made.noting(name) for name in names})

    def init(**given):
        made.note("init", **given)
        return run("log", "finish")

    def start(**given):
        made.note("start", **given)
        return run("log_metrics", "log_parameters", "log_image", "end")

    def picture(image):
        return ("picture", image.size)

    module("wandb", init=init, Image=picture, Settings=dict)
    module(
        "swanlab", init=init, Image=picture, log=made.noting("log"), finish=made.noting("finish")
    )
    module("comet_ml", start=start, ExperimentConfig=dict)

    class Client:
        def get_experiment_by_name(self, name):
            return experiments.get(name)

        def create_experiment(self, name):
            experiments[name] = SimpleNamespace(experiment_id=str(len(experiments)))
            return experiments[name].experiment_id

        def create_run(self, experiment, run_name):
            made.note("create_run", experiment, run_name)
            runs[f"run-{len(runs)}"] = experiment
            return SimpleNamespace(info=SimpleNamespace(run_id=f"run-{len(runs) - 1}"))

        def get_run(self, run):
            return runs[run]

        log_batch = staticmethod(made.noting("log_batch"))
        log_image = staticmethod(made.noting("log_image"))
        set_terminated = staticmethod(made.noting("set_terminated"))

    mlflow = module("mlflow", MlflowClient=Client, get_tracking_uri=lambda: "https://track.example")
    mlflow.entities = module(
        "mlflow.entities", Metric=lambda *row: ("metric", *row), Param=lambda *row: row
    )
    return made


def tell(tracker, steps):
    for step in steps:
        tracker.metrics(step, {"loss": 1.0 / step, "epoch": 1, "spike": ["loss"]})


def row_of(step):
    return {"train/loss": 1.0 / step, "train/epoch": 1}


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_run_that_goes_on_is_the_same_run_there(service, tmp_path, name):
    _, tracker = opened(tmp_path, name)
    tell(tracker, (1, 2, 3))
    tracker.picture(3, "dog", RED)
    tracker.close()
    assert service.named("log") == [
        ((row_of(1),), {"step": 1}),
        ((row_of(2),), {"step": 2}),
        ((row_of(3),), {"step": 3}),
        (({"samples/dog": ("picture", (8, 6))},), {"step": 3}),
    ]
    _, again = opened(tmp_path, name, done=2)
    tell(again, (3, 4))
    again.close()
    first, second = (given for _, given in service.named("init"))
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["project"] == "zorps" and first["config"] == settings(plan_with(name))
    # Step 3 was told before: a run that repeats it has the same values.
    assert [given["step"] for _, given in service.named("log")] == [1, 2, 3, 3, 4]
    assert len(service.named("finish")) == 2


def test_comet(service, tmp_path):
    _, tracker = opened(tmp_path, "comet")
    tell(tracker, (1,))
    tracker.picture(1, "dog", RED)
    tracker.close()
    opened(tmp_path, "comet", done=1)[1].close()
    first, second = (given for _, given in service.named("start"))
    assert first == second
    assert 32 <= len(first["experiment_key"]) <= 50 and first["experiment_key"].isalnum()
    assert (first["mode"], first["online"]) == ("get_or_create", True)
    assert service.named("log_metrics") == [((row_of(1),), {"step": 1})]
    assert service.named("log_image") == [((RED,), {"name": "dog", "step": 1})]
    config = first["experiment_config"]
    assert config["name"] == "quickstart" and config["log_code"] is False


def test_mlflow(service, tmp_path):
    _, tracker = opened(tmp_path, "mlflow")
    tell(tracker, (1,))
    tracker.picture(1, "dog", RED)
    tracker.close()
    _, again = opened(tmp_path, "mlflow", done=1)
    tell(again, (2,))
    again.close()
    assert service.named("create_run") == [(("0", "quickstart"), {})]
    batches = service.named("log_batch")
    assert ("lr", "0.001") in batches[0][1]["params"]
    points = [(rest[0], given["metrics"]) for rest, given in batches[1:]]
    assert [(run, [(p[1], p[2], p[4]) for p in row]) for run, row in points] == [
        ("run-0", [("train/loss", 1.0, 1), ("train/epoch", 1, 1)]),
        ("run-0", [("train/loss", 0.5, 2), ("train/epoch", 1, 2)]),
    ]
    assert service.named("log_image")[0][0] == ("run-0", RED, "samples/dog/step-000001.png")
    assert [given.get("status") for _, given in service.named("set_terminated")] == [
        None,
        "RUNNING",
        None,
    ]


def test_a_service_that_fails_is_told_later(service, tmp_path):
    events = Recorder()
    _, tracker = opened(tmp_path, "wandb", events=events)
    tracker._pauses = (0.0,)
    service.failures = 5
    tell(tracker, (1, 2, 3))
    tracker.close()
    assert [given["step"] for _, given in service.named("log")] == [1, 2, 3]
    (text,) = events.texts
    assert "`wandb` can't be told (no route to host)" in text and "metrics.jsonl" in text


def test_a_service_that_is_gone_ends_nothing_and_catches_up(service, tmp_path):
    events = Recorder()
    lines, tracker = opened(tmp_path, "wandb", events=events)
    tell(tracker, (1,))
    while sent(tmp_path / "trackers" / "wandb.json") < 1:
        threading.Event().wait(0.01)
    tracker._pauses, tracker._closing = (0.05,), 0.1
    service.failures = 10**9
    tell(tracker, (2, 3))
    tell(lines, (1, 2, 3))
    tracker.close()
    assert "was not told of 2 records" in events.texts[-1]
    lines.close()
    service.failures = 0
    resumed_lines, resumed = opened(tmp_path, "wandb", done=3)
    tell(resumed, (4,))
    resumed.close()
    resumed_lines.close()
    assert [given["step"] for _, given in service.named("log")] == [1, 2, 3, 4]


def test_training_never_waits_for_a_service(tmp_path):
    hold, seen = threading.Event(), []

    class Slow:
        def metrics(self, step, values):
            hold.wait(10)
            seen.append(step)

        def close(self):
            seen.append("closed")

    background = Background("slow", Slow(), Recorder(), tmp_path / "slow.json")
    tell(background, range(1, 50))
    assert seen == []
    hold.set()
    background.close()
    assert seen == [*range(1, 50), "closed"]


@pytest.mark.parametrize("name", ["wandb", "comet", "swanlab"])
def test_offline_asks_no_network(service, tmp_path, monkeypatch, name):
    monkeypatch.setenv(OFFLINE, "1")
    opened(tmp_path, name)[1].close()
    (given,) = [given for called, _, given in service.calls if called in ("init", "start")]
    assert given.get("mode") == "offline" or given.get("online") is False


def test_offline_refuses_a_server(service, tmp_path, monkeypatch):
    monkeypatch.setenv(OFFLINE, "1")
    with pytest.raises(MachineUnfit, match=r"track\.example.*--offline"):
        opened(tmp_path, "mlflow")


def test_a_service_that_refuses_is_said_before_anything_slow(service, tmp_path):
    service.failures = 1
    with pytest.raises(MachineUnfit, match="`wandb` can't be opened: no route") as caught:
        opened(tmp_path, "wandb")
    assert "WANDB_API_KEY" in caught.value.help


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "comet", "mlflow", "swanlab"])
def test_a_missing_package_is_said(tmp_path, monkeypatch, name):
    module = {"tensorboard": "torch.utils.tensorboard", "comet": "comet_ml"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MachineUnfit, match="needs the package") as caught:
        opened(tmp_path, name)
    assert f"tuner[{name}]" in caught.value.help
    assert not (tmp_path / "metrics.jsonl").exists()


def test_no_secret_is_told():
    """What services list of a run comes from the plan alone, and a plan holds no key."""
    assert not any("key" in name or "token" in name for name in settings(quickstart()))
