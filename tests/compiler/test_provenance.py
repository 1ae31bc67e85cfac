"""Each key of a recipe has one decision that says its value and who gave it."""

from __future__ import annotations

from pathlib import Path

import attrs

from compiler.kinds import leaf_of
from compiler.plan import Decision, Plan
from compiler.provenance import INHERITED
from compiler.reference import all_rows
from tests.compiler.recipes import RECIPE, FixedMemory, compiled, project

FULL = (
    RECIPE.replace("resolution = 64", 'resolution = 64\ncaptions = { missing = "skip" }')
    + '[train.ema]\ndecay = 0.9\n[adapter]\nkind = "lora"\n'
    + '[validation]\nprompts = { beach = "a beach", in = { snow = "a hill" } }\n'
)


def _plan(path: Path, *overrides: str, **rest: object) -> Plan:
    result = compiled(path, *overrides, memory_model=FixedMemory(), **rest)  # type: ignore[arg-type]
    assert result.plan is not None, result.diagnostics
    return result.plan


def _by_key(plan: Plan) -> dict[str, Decision]:
    return {decision.key: decision for decision in plan.decisions}


def test_every_leaf_of_the_schema_is_explained_once(tmp_path: Path) -> None:
    plan = _plan(project(tmp_path, FULL))
    distilled = FULL.replace('[adapter]\nkind = "lora"\n', "[sprint]\n")  # never both
    (tmp_path / "distilled.toml").write_text(distilled)
    encoders = FULL.replace('"sana"', '"sd"').replace("sks dog", "<x> dog")
    encoders += '[train.text_encoders]\n[[embeddings.token]]\nname = "<x>"\n'
    spoken = _plan(project(tmp_path / "clip", encoders, "sd")).decisions
    keys = [decision.key for decision in plan.decisions]
    others = [decision.key for decision in _plan(tmp_path / "distilled.toml").decisions]
    assert len(keys) == len(set(keys)) and len(others) == len(set(others))
    leaves = {row.key.replace("[]", "[0]") for row in all_rows() if not row.fields}
    sprint = {key for key in leaves if key.startswith("sprint.")}
    text = {k for k in leaves if k.startswith(("train.text_encoders.", "embeddings."))}
    assert leaves - sprint - text - {"validation.prompts"} <= set(keys)
    assert text and text <= {decision.key for decision in spoken}
    assert sprint and sprint <= set(others)
    assert {"validation.prompts.beach", "validation.prompts.in.snow"} <= set(keys)
    assert all(d.source and (d.value or d.source in ("default", INHERITED)) for d in plan.decisions)
    assert "auto" not in {decision.value for decision in plan.decisions}


def test_the_order_is_that_of_the_schema(tmp_path: Path) -> None:
    order = {row.key: at for at, row in enumerate(all_rows())}
    keys = [d.key.replace("[0]", "[]") for d in _plan(project(tmp_path, FULL)).decisions]
    places = [order[key] for key in keys if key in order]
    assert places == sorted(places)


def test_who_gave_a_value(tmp_path: Path) -> None:
    presets = tmp_path / "presets"
    presets.mkdir()
    (presets / "small.toml").write_text("# small\n[train]\naccumulate = 3\n")
    path = project(tmp_path, 'extends = "preset:small"\n' + FULL)
    found = _by_key(_plan(path, "seed=4", presets=presets))
    assert found["train.accumulate"].source == "preset:small:3"
    assert (found["seed"].value, found["seed"].source) == ("4", "--set")
    assert found["model.family"].source.endswith("recipe.toml:5")
    assert found["train.loss.kind"] == Decision(
        key="train.loss.kind", value="mse", source="default", why=""
    )
    assert found["adapter.alpha"].source == "pass model" and found["adapter.alpha"].why
    assert found["memory.activation_checkpointing"].source == "pass memory"


def test_a_source_says_what_it_takes_from_data(tmp_path: Path) -> None:
    found = _by_key(_plan(project(tmp_path, FULL)))
    for key, value in {
        "captions.missing": "skip",
        "captions.dropout": "0",
        "resolution": "64",
        "crop.style": "center",
    }.items():
        decision = found[f"data.source[0].{key}"]
        assert (decision.value, decision.source) == (value, INHERITED)
        assert decision.why == f"as data.{key}"
    assert found["data.source[0].captions.from"].value == "instance"


def test_what_is_left_out_and_what_nothing_depends_on(tmp_path: Path) -> None:
    result = compiled(project(tmp_path))  # no prompts, nothing simulated
    assert result.plan is not None
    found = _by_key(result.plan)
    assert found["adapter"].value == found["train.ema"].value == "left out"
    assert found["validation.guidance"].value == "not used"
    assert found["validation.guidance"].why
    assert found["memory.activation_checkpointing"].value == "off"
    assert found["memory.activation_checkpointing"].why == "nothing was simulated"


def test_decisions_hold_only_text(tmp_path: Path) -> None:
    for decision in _plan(project(tmp_path, FULL)).decisions:
        assert all(type(value) is str for value in attrs.astuple(decision))
        assert leaf_of(type(decision.value)) is None
