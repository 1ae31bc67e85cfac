"""Metrics: one line a step, none doubled or missing after going on; TensorBoard's own reader."""

from __future__ import annotations

import builtins
import json

import pytest
from PIL import Image

from runtime.errors import MachineUnfit
from runtime.track import JsonLines, TensorBoard, open_trackers, truncate


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

    first, second = open_trackers(tmp_path, ("tensorboard",), 0)
    first.close()
    for step in (1, 2, 3):
        second.metrics(step, {"loss": 1.0 / step, "epoch": 1, "names": ["a.jpg"]})
    second.picture(3, "dog", Image.new("RGB", (8, 6), (255, 0, 0)))
    second.close()
    resumed = TensorBoard(tmp_path / "tensorboard", 2)
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

    board = TensorBoard(tmp_path, 0)
    board.picture(3, "dog", Image.new("RGB", (8, 6), (255, 0, 0)))
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    picture = events.Images("samples/dog")[0]
    assert (picture.width, picture.height, picture.step) == (8, 6, 3)


def test_missing_tensorboard_is_said(tmp_path, monkeypatch):
    true_import = builtins.__import__

    def without(name, *rest):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return true_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MachineUnfit, match="needs the package `tensorboard`") as caught:
        TensorBoard(tmp_path, 0)
    assert "tuner[tensorboard]" in caught.value.help
