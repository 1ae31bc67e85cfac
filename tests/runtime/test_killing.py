"""The law of resume at random points; see `tests.runtime.killing`, which can take hundreds."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.runtime.killing import Point, Stand, draw, judge, kill, torn, uninterrupted

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and POSIX signals")


def test_killed_or_out_of_disk_while_saving(tmp_path: Path) -> None:
    stand, log = Stand(tmp_path), tmp_path / "log"
    expected, counts = uninterrupted(stand, log)
    assert {"text", "latents", "train", "evaluate", "validate", "save", "publish"} <= counts.keys()
    middle = counts["save"] // 2
    for point in (
        Point(label="save", number=middle),
        Point(label="save", number=middle + 5, full=True),
        Point(label="train", number=counts["train"] // 2),
    ):
        fault, code = judge(stand, point, expected, log)
        assert fault == "", log.read_text()
        assert code == (1 if point.full else -9)


def test_a_torn_file_is_noticed(tmp_path: Path) -> None:
    """Or none of this means anything."""
    plan, _ = Stand(tmp_path).plan()
    folder = Path(plan.run_folder)
    for name in ("checkpoints/step-000002/state.json", "samples/a.png", "lora/x.safetensors"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"{")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"st')  # a last line may be cut
    assert [words.split(":")[0] for words in torn(plan)] == [
        "step-000002 is not complete",
        "checkpoints/step-000002/state.json",
        "lora/x.safetensors",
        "samples/a.png",
    ]


def test_points_are_shared_out_and_repeat() -> None:
    counts = {"text": 9, "save": 70, "train": 30}
    points = draw(counts, 60, 3)
    assert points == draw(counts, 60, 3) != draw(counts, 60, 4)
    assert min(Counter(point.label for point in points).values()) >= 15
    assert all(1 <= point.number <= counts[point.label] for point in points)


@pytest.mark.slow
def test_killed_at_random_points(tmp_path: Path) -> None:
    faults, happened = kill(tmp_path, 6, 11)
    assert faults == [], (tmp_path / "log").read_text()
    assert sum(happened.values()) == 6
