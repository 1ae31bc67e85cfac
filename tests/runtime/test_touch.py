"""`touch save` and `touch stop` in the folder of a run that goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compiler.adapters import LORA_FILE
from runtime import checkpoints
from runtime.events import Silent
from runtime.execute import execute
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.tiny import make_tiny

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="open files can't be replaced")


class Touching(Silent):
    """Makes a file while the step of that number is reported."""

    def __init__(self, step: int, path: Path) -> None:
        self.at, self.path = step, path

    def step(self, metrics):
        if metrics["step"] == self.at:
            self.path.touch()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny("sana", tmp_path_factory.mktemp("sana"))


def steps_saved(plan) -> list[int]:
    saved = checkpoints.complete(Path(plan.run_folder) / "checkpoints")
    return [checkpoints.read_state(path)["step"] for path in saved]


def test_save_and_stop_change_no_weight(base, tmp_path):
    data = draw_data(tmp_path / "dog")
    plans = [tiny_plan("sana", base, data, tmp_path / name)[0] for name in ("whole", "asked")]
    manifest = tiny_plan("sana", base, data, tmp_path / "whole")[1]
    whole, asked = plans
    execute(whole, manifest, Silent())
    folder = Path(asked.run_folder)

    assert execute(asked, manifest, Touching(2, folder / "stop")).step == 2
    assert steps_saved(asked) == [2]
    assert execute(asked, manifest, Touching(4, folder / "save")).status == "finished"
    assert steps_saved(asked) == [2, 4, 6]
    assert not (folder / "stop").exists() and not (folder / "save").exists()
    one, other = (load_file(Path(plan.run_folder) / "lora" / LORA_FILE) for plan in plans)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
