"""Whole runs of tiny pipelines: their plans, what they leave, and processes that do them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attrs import evolve

from compiler.plan import Plan, Precision
from runtime import checkpoints
from runtime.context import result_folder
from tests.runtime.plans import LORA, draw_data, source_of, tiny_plan
from tests.runtime.tiny import make_tiny

SIZES = ((70, 70), (70, 70), (140, 70), (64, 64), (70, 140))
FLOAT32 = Precision(compute="float32", weights="float32", trained="float32", cache="float32")
MIXED = Precision(compute="bfloat16", weights="bfloat16", trained="float32", cache="bfloat16")
RUNNING = getattr(os, "WEXITED", 0) | getattr(os, "WNOHANG", 0) | getattr(os, "WNOWAIT", 0)
NEVER = ("", 0, signal.SIGTERM)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny pipelines and data, made once; caches are shared by all runs, as they are in life."""
    folder = tmp_path_factory.mktemp("execute")
    for family in ("sana", "sd3"):
        make_tiny(family, folder / family)
    draw_data(folder / "dog", SIZES)
    draw_data(folder / "cat", SIZES[:2])
    return folder


@pytest.fixture
def make(place, tmp_path):
    """A maker of plans, each with a run folder of its own below this test's folder."""

    def made(family: str = "sana", method: str = "lora", name: str = "run", **changes):
        sources = (
            source_of(place / "dog", "a photo of sks dog", repeats="1.5", dropout=0.3),
            source_of(place / "cat", "a photo of sks cat"),
        )
        settings = {
            "steps": 7,
            "accumulate": 2,
            "every": 2,
            "adapter": evolve(LORA, dropout=0.2) if method == "lora" else None,
            "cache_folder": str(place / "cache"),
            **changes,
        }
        return tiny_plan(family, place / family, sources, tmp_path / name, **settings)

    return made


def final(plan: Plan):
    """Everything that a run leaves: every tensor by name, and the metrics but for the time."""
    saved = checkpoints.latest(Path(plan.run_folder) / "checkpoints")
    assert saved is not None
    snapshot = checkpoints.load(saved)
    tensors = {f"weights.{k}": v for k, v in snapshot.weights.items()}
    tensors |= {f"ema.{k}": v for k, v in (snapshot.ema or {}).items()}
    for index, states in snapshot.optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in states.items()}
    for file in sorted(result_folder(plan).rglob("*.safetensors")):
        from safetensors.torch import load_file

        tensors |= {f"{file.name}.{k}": v for k, v in load_file(file).items()}
    return snapshot.step, tensors, metrics_of(plan)


def metrics_of(plan: Plan) -> list[dict[str, object]]:
    lines = (Path(plan.run_folder) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row.pop("seconds")
    return rows


def assert_equal(plan: Plan, other: Plan) -> None:
    (step, tensors, metrics), (step_b, tensors_b, metrics_b) = final(plan), final(other)
    assert step == step_b
    assert tensors.keys() == tensors_b.keys()
    different = [k for k, v in tensors.items() if not torch.equal(v, tensors_b[k])]
    assert different == []
    assert metrics == metrics_b
    assert [row["step"] for row in metrics] == list(range(1, step + 1))


def fork(task: Callable[[], int]) -> int:
    """Runs `task` in a process of its own; returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = task()
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """The exit code of `pid`, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def steps_done(plan: Plan) -> int:
    path = Path(plan.run_folder) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
