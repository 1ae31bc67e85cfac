"""Runs with each kind of adapter: killed off and gone on with, exported, and loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compiler.adapters import ADAPTERS, LORAS, AdapterKind
from compiler.families import FAMILIES
from compiler.plan import Plan
from runtime.execute import execute
from runtime.export.export import export
from runtime.export.request import Refused, chosen, requested
from tests.runtime.families.test_sd import objective
from tests.runtime.methods.test_kinds import LOADERS, adapter_of, apart, by_peft, output, plain
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.tiny import make_tiny
from tests.test_matrix import CopyAfter, goes_on

CASES: dict[str, dict[str, Any]] = {
    "lora": {"init": "pissa", "scaling": "sqrt-rank", "dropout": 0.2},
    "dora": {"dropout": 0.2},
    "lokr": {"rank_dropout": 0.2, "module_dropout": 0.2},
    "loha": {"rank_dropout": 0.2, "module_dropout": 0.2},
    "glora": {},
    "ia3": {},
    "full": {},
    "oft": {"dropout": 0.5},
    "boft": {"dropout": 0.5},
    "dylora": {"dropout": 0.2, "block_size": 1},
}
WHOLE = bool(os.environ.get("TUNER_WHOLE_MATRIX"))  # else each kind with one family after the other
PAIRS = [
    pytest.param(kind, family, marks=() if family == "sana" else pytest.mark.slow)
    for number, kind in enumerate(CASES)
    for place, family in enumerate(("sd", "sana", "sd3"))
    if WHOLE or place == number % 3
]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Plans of three steps on a tiny base of a family, with pictures."""
    root: Path = tmp_path_factory.mktemp("runs")

    def make(family: str, name: str, kind: AdapterKind) -> Any:
        folder = root / family
        if not folder.exists():
            make_tiny(family, folder)
            draw_data(root / f"{family}-dog", ((64, 64),) * 3)
        adapter = adapter_of(kind, family, **CASES[kind])
        settings: dict[str, Any] = {"adapter": adapter, "lr": 3e-2, "every": 1}
        if FAMILIES[family].prediction != "flow":
            settings["objective"] = objective()
        given = (family, folder, root / f"{family}-dog", root / f"{family}-{name}")
        return tiny_plan(*given, steps=3, **settings)

    return make


@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_a_run_that_is_killed_ends_with_the_same_bits(
    planned: Callable[..., Any], family: str, kind: AdapterKind, tmp_path: Path
) -> None:
    plan, manifest = planned(family, kind, kind)
    copied = CopyAfter(plan, 2)
    assert execute(plan, manifest, copied).status == "finished"
    result = Path(plan.run_folder) / kind / ADAPTERS[kind].file
    ended = {key: tensor.clone() for key, tensor in load_file(result).items()}
    goes_on(plan, manifest, copied)
    again = load_file(result)
    assert again.keys() == ended.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in ended.items())
    check_exports(plan, tmp_path)


def check_exports(plan: Plan, tmp_path: Path) -> None:
    """The result, its export, that of the last checkpoint, and the merged model compute alike."""
    assert plan.adapter is not None
    family, file = plan.model.family, ADAPTERS[plan.adapter.kind].file
    base, run = Path(plan.model.base), Path(plan.run_folder)
    result = output(LOADERS[file](base, run / plan.adapter.kind), family)
    assert apart(result, output(plain(base), family)) > 1e-3
    for name, step in (("result", None), ("checkpoint", 3)):
        weights = chosen(run, step=step)
        place = tmp_path / name
        out = place if file == "adapter_model.safetensors" else place / file
        export(requested(weights, out=out))
        assert apart(output(LOADERS[file](base, place), family), result) < 1e-5
    merged = export(requested(chosen(run, ema=False), merge=True, out=tmp_path / "merged"))
    component = plan.model.trained_component
    (saved,) = (merged / component).glob("*.safetensors")
    stock = plain(base)
    stock.load_state_dict(load_file(saved))
    trained = export(requested(chosen(run, ema=False), out=tmp_path / "trained" / file))
    place = trained if trained.is_dir() else trained.parent
    assert apart(output(LOADERS[file](base, place), family), output(stock, family)) < 1e-5
    if plan.adapter.kind in LORAS:
        out = export(requested(chosen(run), format="peft", out=tmp_path / "peft"))
        assert apart(output(by_peft(base, out), family), result) < 1e-5
    if plan.adapter.kind == "full" and family != "sana":
        own, there = tmp_path / "checkpoint" / file, tmp_path / "kohya.safetensors"
        export(requested(chosen(run, step=3), format="kohya", out=there))
        one, other = (load_file(path) for path in (own, there))
        assert all(key.startswith("lora_unet_") for key in other)
        squares = [
            sum(float(t.double().square().sum()) for t in each.values()) for each in (one, other)
        ]
        assert squares[0] == pytest.approx(squares[1], rel=1e-12)
    if plan.adapter.kind in ("lokr", "oft"):
        title = ADAPTERS[plan.adapter.kind].title
        with pytest.raises(Refused, match=f"there are no kohya keys for {title}"):
            requested(chosen(run), format="kohya")
