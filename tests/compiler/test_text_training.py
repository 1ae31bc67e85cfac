"""Text encoders that are trained: what is planned, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiler.plan import Plan
from tests.compiler.recipes import RECIPE, FixedMemory, codes, compiled, project

LORA = '\n[adapter]\nkind = "lora"\nrank = 8\nalpha = 4\n'
TABLE = "\n[train.text_encoders]\n"


def recipe(family: str, more: str = LORA + TABLE) -> str:
    return RECIPE.replace('"sana"', f'"{family}"') + more


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("sdxl"), recipe("sdxl"), "sdxl")


def planned(path: Path, *overrides: str) -> Plan:
    result = compiled(path, *overrides, memory_model=FixedMemory())
    assert result.plan is not None, result.diagnostics
    return result.plan


def test_all_clips_with_the_adapter_s_settings(sdxl: Path) -> None:
    facts = planned(sdxl).text_training
    assert facts is not None and facts.adapter is not None
    assert facts.encoders == ("text_encoder", "text_encoder_2")
    assert (facts.adapter.kind, facts.adapter.rank, facts.adapter.alpha) == ("lora", 8, 4.0)
    assert (facts.lr, facts.until) == (1e-4, planned(sdxl).steps.total)
    assert planned(sdxl).digest != planned(sdxl, "train.text_encoders.lr=5e-5").digest


def test_settings_of_their_own(sdxl: Path) -> None:
    given = ("lr=5e-5", "rank=2", 'until="50%"', 'targets="all-linear"', 'which=["text_encoder_2"]')
    plan = planned(sdxl, *(f"train.text_encoders.{each}" for each in given))
    facts = plan.text_training
    assert facts is not None and facts.adapter is not None
    assert facts.encoders == ("text_encoder_2",)
    assert (facts.lr, facts.until) == (5e-5, plan.steps.total // 2)
    assert (facts.adapter.rank, facts.adapter.alpha) == (2, 1.0)  # the scale is the same
    assert any("fc" in pattern for pattern in facts.adapter.targets)
    told = {d.key: d for d in plan.decisions if d.key.startswith("train.text_encoders.")}
    assert {key.rpartition(".")[2] for key in told} == {"which", "lr", "until", "rank", "targets"}


def test_all_weights_without_an_adapter(tmp_path: Path) -> None:
    plan = planned(project(tmp_path, recipe("sd", TABLE), "sd"), "precision.compute=bf16")
    facts = plan.text_training
    assert facts is not None and facts.adapter is None
    parts = {part.name: part for part in plan.model.components}
    assert parts["text_encoder"].trained and parts["unet"].trained
    assert parts["text_encoder"].dtype == plan.precision.trained == "float32"


def test_frozen_weights_compute_as_the_model_does(sdxl: Path) -> None:
    plan = planned(sdxl, "precision.compute=bf16")
    parts = {part.name: part.dtype for part in plan.model.components}
    assert parts["text_encoder"] == parts["text_encoder_2"] == "bfloat16"


def test_the_candidate_holds_the_encoders(sdxl: Path) -> None:
    memory = FixedMemory()
    plan = compiled(sdxl, memory_model=memory).plan
    assert plan is not None
    assert memory.asked[0].text_training == plan.text_training


@pytest.mark.parametrize(
    ("overrides", "code", "path"),
    [
        (('train.text_encoders.which=["text_encoder_3"]',), "not-in-family", "which[0]"),
        (('train.text_encoders.until="0%"',), "out-of-range", "until"),
        (("train.text_encoders.rank=0",), "out-of-range", "rank"),
        (("adapter.init=olora",), "conflict", "init"),
        (("adapter.init=orthogonal", "train.text_encoders.rank=3"), "conflict", "rank"),
        (("model.text_encoder.quantize=int8",), "conflict", "quantize"),
        (("model.text_encoder.weights=fp16",), "precision-mismatch", "weights"),
        (("train.optimizer.name=muon", "train.text_encoders.lr=1e-5"), "conflict", "lr"),
        (("launch.devices=2", "launch.strategy=fsdp"), "not-sharded", "text_encoders"),
        (("launch.devices=2", "launch.strategy=deepspeed"), "not-sharded", "text_encoders"),
    ],
)
def test_what_does_not_go_with_it(
    sdxl: Path, overrides: tuple[str, ...], code: str, path: str
) -> None:
    result = compiled(sdxl, *overrides)
    found = {fault.code: fault for fault in result.diagnostics if fault.severity == "error"}
    assert set(found) == {code}, result.diagnostics
    assert found[code].path.endswith(path)


@pytest.mark.parametrize("family", ["sana", "kolors", "pixart", "lumina2"])
def test_language_models_are_refused(family: str, tmp_path: Path) -> None:
    result = compiled(project(tmp_path, recipe(family), family))
    assert "not-in-family" in codes(result)


def test_t5_is_refused_by_name(tmp_path: Path) -> None:
    path = project(tmp_path, recipe("sd3", LORA + TABLE + 'which = ["text_encoder_3"]\n'), "sd3")
    (fault,) = compiled(path).diagnostics
    assert fault.code == "not-in-family" and "T5EncoderModel" in fault.message
    assert "`text_encoder_2`" in fault.help


def test_other_adapters_have_no_place_for_encoders(tmp_path: Path) -> None:
    path = project(tmp_path, recipe("sd", '\n[adapter]\nkind = "loha"\n' + TABLE), "sd")
    assert codes(compiled(path)) == ["conflict"]


def test_rank_needs_an_adapter(tmp_path: Path) -> None:
    path = project(tmp_path, recipe("sd", TABLE + "rank = 4\n"), "sd")
    assert codes(compiled(path)) == ["no-effect"]


def header(path: Path, tensors: dict[str, list[int]]) -> None:
    """A safetensors file of nothing but zeros."""
    entries: dict[str, object] = {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 4 * shape[0] * shape[1]
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


MODEL = {"unet.a.lora_A.weight": [8, 4], "unet.a.lora_B.weight": [4, 8]}
CLIP = {"text_encoder.text_model.b.lora_A.weight": [8, 4]}


@pytest.mark.parametrize(
    ("table", "tensors", "words"),
    [
        (TABLE, {**MODEL, **CLIP}, ""),
        (TABLE + "rank = 4\n", {**MODEL, **CLIP}, "of rank 8, the recipe's is 4"),
        (TABLE, MODEL, "holds no adapter of the text encoder"),
        ("", {**MODEL, **CLIP}, "which is not trained here"),
        ("", MODEL, ""),
    ],
)
def test_a_file_to_start_from_fits_the_encoders(
    tmp_path: Path, table: str, tensors: dict[str, list[int]], words: str
) -> None:
    adapter = '\n[adapter]\nkind = "lora"\nrank = 8\nfrom = "a.safetensors"\n'
    path = project(tmp_path, recipe("sd", adapter + table), "sd")
    header(path.parent / "a.safetensors", tensors)
    result = compiled(path)
    assert codes(result) == (["bad-adapter"] if words else []), result.diagnostics
    assert not words or words in result.diagnostics[0].message


KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    ("family", "tensors", "words"),
    [
        (
            "sdxl",
            {f"unet.{KEY}.lora_A.weight": [8, 768], **CLIP},
            "as Stable Diffusion 1 and 2 has",
        ),
        (
            "sdxl",
            {f"lora_unet_{KEY.replace('.', '_')}.lora_down.weight": [8, 1280]},
            "1280 numbers, as Stable Diffusion XL refiner has them, and this base's have 2048",
        ),
        ("sdxl", {"lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": [8, 4]}, "has a UNet"),
        (
            "sdxl",
            {f"transformer.transformer_{KEY[5:]}.lora_A.weight": [8, 4], **CLIP},
            "has a UNet",
        ),
        ("sdxl", {"transformer.layers.0.attn.to_q.lora_A.weight": [8, 4]}, "has a UNet"),
        ("sd3", {f"unet.{KEY}.lora_A.weight": [8, 768], **CLIP}, "has a transformer"),
    ],
)
def test_a_file_of_another_family_is_told_as_such(
    tmp_path: Path, family: str, tensors: dict[str, list[int]], words: str
) -> None:
    """Not as one whose encoders are to be trained."""
    adapter = '\n[adapter]\nkind = "lora"\nrank = 8\nfrom = "a.safetensors"\n'
    path = project(tmp_path, recipe(family, adapter), family)
    header(path.parent / "a.safetensors", tensors)
    result = compiled(path)
    assert codes(result) == ["bad-adapter"], result.diagnostics
    assert "is an adapter of another family: " in result.diagnostics[0].message
    assert words in result.diagnostics[0].message
    assert "text_encoders" not in (result.diagnostics[0].help or "")


def test_encoders_that_are_told_of_padding_are_refused(tmp_path: Path) -> None:
    path = project(tmp_path, recipe("sd"), "sd")
    config = path.parent / "base" / "text_encoder" / "config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "use_attention_mask": True}))
    (fault,) = compiled(path).diagnostics
    assert fault.code == "not-in-family" and "use_attention_mask" in fault.message
