"""Shipped presets: they hold only differences, and a name, data and a length make them whole."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from attrs import evolve

from compiler.inherit import preset_names
from tests.compiler.recipes import GIB, GPU, FixedMemory, compiled, make_pictures

PRESETS = Path(__file__).parents[2] / "recipes" / "presets"
CHILD = """\
extends = "preset:{name}"
name = "try"

[[data.source]]
path = "pictures"
captions = {{ from = "instance", prompt = "a photo of sks dog" }}

[train]
epochs = 2
"""


def test_there_are_presets() -> None:
    assert {"sana-1.6b-lora-12g", "sd35-large-lora-24g"} <= set(preset_names(PRESETS))


@pytest.mark.parametrize("name", preset_names(PRESETS))
def test_a_preset_with_name_data_and_length_compiles(name: str, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", [(1536, 1536)] * 5)
    path = tmp_path / "child.toml"
    path.write_text(CHILD.format(name=name))
    card = int(name.rpartition("-")[2].removesuffix("g"))
    machine = evolve(GPU, device_total_bytes=card * GIB, device_free_bytes=card * GIB)
    result = compiled(path, machine=machine, presets=PRESETS, memory_model=FixedMemory())
    assert result.plan is not None, [fault.message for fault in result.diagnostics]
    warned = {fault.code for fault in result.diagnostics}
    assert warned <= ({"bf16-trained"} if name == "sana-1.6b-full-24g" else set())
    assert 0.85 * card * GIB < result.plan.memory.budget_bytes < card * GIB
    assert (result.plan.adapter is not None) == ("-lora-" in name)
    given = {d.key: d.source for d in result.plan.decisions}
    assert given["model.base"].startswith(f"preset:{name}:")


@pytest.mark.parametrize("name", preset_names(PRESETS))
def test_a_preset_says_nothing_of_what_is_yours(name: str) -> None:
    data = tomllib.loads((PRESETS / f"{name}.toml").read_text())
    assert set(data) <= {"model", "adapter", "memory", "precision", "train", "launch"}
    assert not {"epochs", "steps"} & set(data["train"])
