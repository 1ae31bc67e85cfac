"""What exported files are called and say of themselves: each wish shows, no folder of ours does."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from safetensors import safe_open

from compiler.plan import Component
from runtime.export.export import export
from runtime.export.request import Refused, chosen, requested

WISHES: tuple[tuple[bool | None, dict[str, Any], str], ...] = (
    (None, {}, "-ema.safetensors"),  # what the plan saves
    (False, {}, ".safetensors"),
    (None, {"resize": "1"}, "-ema-rank-1.safetensors"),
    (False, {"resize": "1"}, "-rank-1.safetensors"),
    (False, {"resize": "95%"}, "-energy-0.95.safetensors"),
    (False, {"precision": "bf16"}, "-bf16.safetensors"),
    (False, {"format": "kohya"}, "-kohya.safetensors"),
    (False, {"format": "kohya", "precision": "fp16"}, "-kohya-fp16.safetensors"),
    (False, {"format": "peft"}, "-peft"),
    (False, {"merge": True}, "-merged"),
    (False, {"merge": True, "single_file": True}, "-merged.safetensors"),
    (
        False,
        {"merge": True, "single_file": True, "everything": True},
        "-merged-everything.safetensors",
    ),
)


def test_each_wish_has_a_name_of_its_own(runs: Any) -> None:
    folder = Path(runs("sd3").run_folder)
    found = [requested(chosen(folder, ema=ema), **wish).out for ema, wish, _ in WISHES]
    assert all(one != other for one, other in combinations(found, 2))
    stem = folder / "export" / f"{folder.name}-step-000004"
    assert [str(path) for path in found] == [f"{stem}{ending}" for _, _, ending in WISHES]


def test_the_average_after_the_trained_weights(runs: Any, tmp_path: Path) -> None:
    """Once it was refused as being there already."""
    folder = Path(runs("sd3").run_folder)
    files = [export(requested(chosen(folder, ema=ema))) for ema in (False, True)]
    try:
        assert files[0] != files[1] and all(file.is_file() for file in files)
        with pytest.raises(Refused, match="is there already"):
            requested(chosen(folder, ema=True))
    finally:
        for file in files:
            file.unlink()


@pytest.mark.parametrize("wish", [wish for _, wish, _ in WISHES[3:]], ids=lambda wish: str(wish))
def test_no_file_says_where_the_base_lies(runs: Any, tmp_path: Path, wish: dict[str, Any]) -> None:
    plan = runs("sd3")
    assert plan.model.local
    out = export(requested(chosen(Path(plan.run_folder)), out=tmp_path / "out", **wish))
    for file in [out] if out.is_file() else sorted(out.rglob("*")):
        if file.is_file():
            assert str(Path(plan.model.base).parent).encode() not in file.read_bytes(), file
    if out.is_file():
        with safe_open(out, "pt") as opened:
            assert opened.metadata()["ss_sd_model_name"] == Path(plan.model.base).name


@pytest.mark.parametrize("full", [False, True])
def test_no_result_says_where_the_base_lies(runs: Any, full: bool) -> None:
    """It is published as it is."""
    plan = runs("sd3", full=full)
    result = Path(plan.run_folder) / ("model" if full else "lora")
    for file in sorted(result.rglob("*")):
        if file.is_file():
            assert str(Path(plan.model.base).parent).encode() not in file.read_bytes(), file


def test_what_a_model_is_called_by(runs: Any) -> None:
    model = runs("sd3").model
    assert model.shared_origin == model.called == Path(model.base).name
    named = evolve(model, base="stabilityai/sana", local=False)
    assert named.shared_origin == named.called == named.origin == "stabilityai/sana"
    (own,) = (c for c in model.components if c.name == model.trained_component)
    assert isinstance(own, Component)
    others = tuple(c for c in model.components if c is not own)
    from_file = evolve(model, components=(*others, evolve(own, file="/secret/place/x.safetensors")))
    assert from_file.shared_origin == f"x.safetensors, with the rest of {model.called}"
