"""One table shape for every component: what is resolved, and what is refused with which words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from attrs import evolve

from compiler.plan import Component, Decision, Plan
from compiler.quantisers import QUANTISERS
from tests.compiler.recipes import GPU, RECIPE, codes, compiled, project

LORA = '[adapter]\nkind = "lora"\n'
SD3 = RECIPE.replace('family = "sana"', 'family = "sd3"')


def planned(path: Path, *overrides: str) -> Plan:
    result = compiled(path, *overrides, machine=GPU)
    assert result.plan is not None, result.diagnostics
    return result.plan


def parts(plan: Plan) -> dict[str, Component]:
    return {component.name: component for component in plan.model.components}


def by_key(plan: Plan) -> Mapping[str, Decision]:
    return {decision.key: decision for decision in plan.decisions}


def refused(path: Path, *overrides: str, code: str) -> tuple[str, str]:
    """The message and the help of the only diagnostic."""
    result = compiled(path, *overrides, machine=GPU)
    assert codes(result) == [code], result.diagnostics
    return result.diagnostics[0].message, result.diagnostics[0].help


def test_what_a_recipe_leaves_open(tmp_path: Path) -> None:
    plan = planned(project(tmp_path, SD3 + LORA, "sd3"))
    found = parts(plan)
    assert {part.quantize for part in found.values()} == {"none"}
    assert found["transformer"].dtype == found["text_encoder_3"].dtype == "bfloat16"
    assert found["vae"].dtype == "float32"
    decisions = by_key(plan)
    assert decisions["model.vae.weights"].value == "float32"
    assert decisions["model.vae.weights"].why == "each picture is encoded once: exactly"
    assert decisions["model.text_encoder_2.weights"].source == "pass components"
    assert decisions["model.text_encoder_2.quantize"].source == "default"


def test_each_component_has_its_own_table(tmp_path: Path) -> None:
    extra = (
        '[model.transformer]\nquantize = "nf4"\n'
        '[model.text_encoder]\nweights = "fp32"\n'
        '[model.text_encoder_3]\nquantize = "int8"\nwhere = "cpu"\n'
        '[model.vae]\nweights = "bf16"\n'
    )
    plan = planned(project(tmp_path, SD3 + LORA + extra, "sd3"))
    found = {name: (c.dtype, c.quantize, c.quantize_on) for name, c in parts(plan).items()}
    assert found["transformer"] == ("bfloat16", "nf4", "device")
    assert found["text_encoder"] == ("float32", "none", "device")
    assert found["text_encoder_2"] == ("bfloat16", "none", "device")
    assert found["text_encoder_3"] == ("bfloat16", "int8", "cpu")
    assert found["vae"] == ("bfloat16", "none", "device")
    decision = by_key(plan)["model.text_encoder_3.quantize"]
    assert decision.value == "int8" and ":" in decision.source


def test_auto_keeps_weights_whole_where_nothing_asks_for_less(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + LORA)
    plan = planned(path, 'model.transformer.quantize="auto"', 'model.text_encoder.quantize="auto"')
    assert {part.quantize for part in parts(plan).values()} == {"none"}
    decision = by_key(plan)["model.text_encoder.quantize"]
    assert (decision.value, decision.why) == ("none", "kept whole")


def test_quantised_weights_are_another_trajectory(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + LORA)
    plans = [
        planned(path, f'model.transformer.quantize="{kind}"') for kind in ("none", *QUANTISERS)
    ]
    assert len({plan.digest for plan in plans}) == len(plans)


def test_the_transformer_s_own_format(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + LORA)
    plan = planned(path, 'model.transformer.weights="bf16"', 'precision.weights="fp32"')
    assert plan.precision.weights == parts(plan)["transformer"].dtype == "bfloat16"
    assert parts(plan)["text_encoder"].dtype == "float32"
    message, _ = refused(path, 'model.transformer.weights="fp32"', code="precision-mismatch")
    assert message == "a base in float32 can't compute in bfloat16"
    message, _ = refused(path, 'precision.weights="fp32"', code="precision-mismatch")
    assert message == "a base in float32 can't compute in bfloat16"


def test_a_component_that_the_family_does_not_have(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + LORA + '[model.text_encoder_2]\nweights = "bf16"\n')
    message, help = refused(path, code="no-such-component")
    assert message == "Sana has no text encoder 2"
    assert help == "its components are `transformer`, `text_encoder`, `vae`"


def test_what_is_trained_in_full_is_not_quantised(tmp_path: Path) -> None:
    path = project(tmp_path)
    message, help = refused(path, 'model.transformer.quantize="nf4"', code="quantised-training")
    assert message == (
        "all of the transformer is trained, and nf4 weights can't be: steps are smaller than their "
        "levels"
    )
    assert help == "leave out `quantize`, or train an adapter with `[adapter]`"
    path = project(tmp_path / "fresh", RECIPE + '[model.transformer]\ninit = "random"\n')
    message, _ = refused(path, 'model.transformer.quantize="int8"', code="conflict")
    assert message == "fresh weights are trained, and int8 weights can't be"


def test_its_format_is_that_of_what_is_trained(tmp_path: Path) -> None:
    path = project(tmp_path)
    assert parts(planned(path))["transformer"].dtype == "float32"
    message, help = refused(path, 'model.transformer.weights="bf16"', code="no-effect")
    assert message == "all of the transformer is trained, in the format of `[precision] trained`"
    assert help == 'say `trained = "bf16"` in `[precision]`'


def test_the_autoencoder_is_not_quantised(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + LORA)
    message, _ = refused(path, 'model.vae.quantize="int8"', code="quantised-vae")
    assert message.startswith("the vae is not quantised: it is small")


def test_random_weights_are_for_what_is_trained(tmp_path: Path) -> None:
    path = project(tmp_path)
    message, help = refused(path, 'model.vae.init="random"', code="random-frozen")
    assert message == "the vae is not trained, so random weights would stay random"
    assert help == "leave `init` out; it is for the transformer"


def test_a_place_without_quantisation(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + LORA)
    message, _ = refused(path, 'model.text_encoder.where="cpu"', code="no-effect")
    assert message == "the text encoder is not quantised, so `where` has no effect"
    plan = planned(path, 'model.text_encoder.where="cpu"', 'model.text_encoder.quantize="auto"')
    assert parts(plan)["text_encoder"].quantize_on == "cpu"


@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_float16_where_the_family_overflows(tmp_path: Path, name: str) -> None:
    path = project(tmp_path, RECIPE + LORA)
    message, _ = refused(path, f'model.{name}.weights="fp16"', code="fp16-overflow")
    assert message == (
        f"Sana's {name.replace('_', ' ')} can't run in fp16: activations exceed what fp16 holds "
        "(65504)"
    )
    message, _ = refused(path, 'model.transformer.weights="fp16"', code="fp16-overflow")
    assert message == ("Sana can't be trained in fp16: activations exceed what fp16 holds (65504)")


def test_a_vae_that_overflows_and_its_mended_version(tmp_path: Path) -> None:
    """SDXL's own; `force_upcast = false` stands in the configuration of the one that was mended."""
    path = project(tmp_path, RECIPE.replace('family = "sana"', 'family = "sdxl"') + LORA, "sdxl")
    message, _ = refused(path, 'model.vae.weights="fp16"', code="fp16-overflow")
    assert "Stable Diffusion XL's vae can't run in fp16" in message
    assert parts(planned(path, 'model.text_encoder.weights="fp16"'))["vae"].dtype == "float32"
    file = tmp_path / "base" / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "force_upcast": False}))
    assert parts(planned(path, 'model.vae.weights="fp16"'))["vae"].dtype == "float16"


@pytest.mark.parametrize(
    ("family", "stated", "zeros"),
    [
        ("sdxl", {}, True),
        ("sdxl", {"force_zeros_for_empty_prompt": True}, True),
        ("sdxl", {"force_zeros_for_empty_prompt": False}, False),
        ("sdxl_refiner", {}, False),
        ("sd3", {"force_zeros_for_empty_prompt": True}, None),
    ],
)
def test_what_an_empty_negative_prompt_is(
    tmp_path: Path, family: str, stated: dict[str, bool], zeros: bool | None
) -> None:
    recipe = RECIPE.replace('family = "sana"', f'family = "{family}"')
    path = project(tmp_path, recipe + LORA, family)
    file = tmp_path / "base" / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **stated}))
    assert planned(path).text.zeros_for_empty is zeros


def test_a_device_without_the_number_format(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + LORA)
    over = ('launch.device="mps"', 'model.transformer.quantize="fp8"')
    message, help = refused(path, *over, code="conflict")
    assert message == "8-bit floating point (E4M3) weights can't be kept on mps"
    assert help == "these can: `int8`, `int4`, `nf4`"


def test_an_adapter_that_a_quantiser_does_not_carry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All adapters of today are carried by all; a row may say otherwise."""
    row = evolve(QUANTISERS["nf4"], adapters=("loha",))
    monkeypatch.setattr("compiler.passes.components.QUANTISERS", {**QUANTISERS, "nf4": row})
    path = project(tmp_path, RECIPE + LORA)
    message, help = refused(path, 'model.transformer.quantize="nf4"', code="conflict")
    assert message == "a nf4 base can't carry an adapter of kind `lora`"
    assert help == "it can carry `loha`"


def test_faults_of_several_tables_are_told_at_once(tmp_path: Path) -> None:
    extra = '[model.vae]\nquantize = "int4"\n[model.text_encoder_3]\nquantize = "int8"\n'
    result = compiled(project(tmp_path, RECIPE + LORA + extra), machine=GPU)
    assert codes(result) == ["quantised-vae", "no-such-component"]
    assert [fault.span.line for fault in result.diagnostics if fault.span] == [21, 22]
