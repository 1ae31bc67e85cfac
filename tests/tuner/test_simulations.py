"""When a plan is given a simulator of its own, and when that is known to be of no use."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from runtime.memory.apart import Apart
from tuner.simulations import PLANNED, Planning


def simulator(planning: Planning) -> bool:
    """Whether there would be one."""
    return isinstance(planning.simulator(), Apart)


def test_what_was_planned_before_needs_none(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('name = "first"')
    folder = tmp_path / "answers"
    first = Planning(folder, recipe, ["train.steps=3"])
    assert simulator(first)
    assert not folder.exists()  # a recipe that is refused leaves nothing behind
    first.done()
    assert not simulator(Planning(folder, recipe, ["train.steps=3"]))
    assert simulator(Planning(folder, recipe, ["train.steps=4"]))
    recipe.write_text('name = "second"')
    assert simulator(Planning(folder, recipe, ["train.steps=3"]))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_recipe_from_a_pipe_is_left_for_who_reads_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text('name = "piped"'))
    writer.start()
    assert simulator(Planning(tmp_path / "answers", pipe, []))
    assert pipe.read_text() == 'name = "piped"'
    writer.join()


@pytest.mark.parametrize("name", ["none.toml", "a folder", "\udcff.toml"])
def test_what_is_no_recipe_is_no_mistake_of_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    assert simulator(Planning(tmp_path / "answers", tmp_path / name, ["\udcff"]))


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / PLANNED).touch()  # a file where the folder would be
    planning = Planning(tmp_path, tmp_path / "recipe.toml", [])
    planning.done()
    assert simulator(planning)
