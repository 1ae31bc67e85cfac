"""New tokens: what is planned, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.plan import Plan
from tests.compiler.recipes import RECIPE, FixedMemory, codes, compiled, project

TOKEN = '\n[[embeddings.token]]\nname = "<k4s4>"\n'
ALONE = '\n[adapter]\nkind = "textual-inversion"\n'
LORA = '\n[adapter]\nkind = "lora"\nrank = 8\n'


def recipe(family: str, more: str) -> str:
    told = RECIPE.replace('"sana"', f'"{family}"').replace("sks dog", "<k4s4> dog")
    return told + more


def said(word: str) -> str:
    """That captions say a word."""
    return f'data.source[0].captions.prompt="a photo of {word} dog"'


def planned(path: Path, *overrides: str) -> Plan:
    result = compiled(path, *overrides, memory_model=FixedMemory())
    assert result.plan is not None, result.diagnostics
    return result.plan


@pytest.fixture(scope="module")
def pivotal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("pivotal"), recipe("sdxl", LORA + TOKEN), "sdxl")


def test_alone(tmp_path: Path) -> None:
    table = "\n[embeddings]\nlr = 1e-3\n"
    words = TOKEN + 'vectors = 3\ninitial = "white cat"\n'
    plan = planned(project(tmp_path, recipe("sd", ALONE + table + words), "sd"))
    assert plan.adapter is not None and plan.adapter.kind == "textual-inversion"
    facts = plan.embeddings
    assert facts is not None and facts.encoders == ("text_encoder",)
    (token,) = facts.tokens
    assert (token.token, token.vectors, token.initial) == ("<k4s4>", 3, "white cat")
    assert (facts.lr, facts.until) == (1e-3, plan.steps.total)
    assert not any(part.trained for part in plan.model.components)


def test_with_a_lora_and_with_trained_encoders(pivotal: Path) -> None:
    plan = planned(pivotal)
    assert plan.embeddings is not None and plan.text_training is None
    assert plan.embeddings.encoders == ("text_encoder", "text_encoder_2")
    assert plan.embeddings.lr == plan.optimizer.lr
    half = planned(pivotal, 'embeddings.until="50%"').embeddings
    assert half is not None and half.until == plan.steps.total // 2
    both = planned(pivotal, 'train.text_encoders.until="50%"')
    assert both.embeddings == plan.embeddings and both.text_training is not None
    assert both.digest != plan.digest


@pytest.mark.parametrize(
    ("overrides", "code", "path"),
    [
        (('embeddings.token[0].name="k4s4"',), "unknown-value", "name"),
        (('embeddings.token[0].name="<other>"',), "no-effect", "name"),
        (('embeddings.token[0].name="<a/b>"', said("<a/b>")), "bad-name", "name"),
        (('embeddings.token[0].name="<con>"', said("<con>")), "bad-name", "name"),
        (("embeddings.token[0].vectors=80",), "out-of-range", "vectors"),
        (('embeddings.until="0%"',), "out-of-range", "until"),
        (("model.text_encoder.quantize=int8",), "conflict", "quantize"),
        (("train.optimizer.name=prodigy", "embeddings.lr=0.5"), "conflict", "lr"),
        (("launch.devices=2", "launch.strategy=fsdp"), "not-sharded", "embeddings"),
    ],
)
def test_what_does_not_go_with_it(
    pivotal: Path, overrides: tuple[str, ...], code: str, path: str
) -> None:
    result = compiled(pivotal, *overrides)
    found = {fault.code: fault for fault in result.diagnostics if fault.severity == "error"}
    assert code in found and len(found) == 1, result.diagnostics
    assert found[code].path.endswith(path)


def test_one_word_twice(tmp_path: Path) -> None:
    path = project(tmp_path, recipe("sd", LORA + TOKEN + TOKEN), "sd")
    assert codes(compiled(path)) == ["duplicate-id"]


def test_words_that_differ_by_case_are_one_to_the_tokenizer(tmp_path: Path) -> None:
    other = TOKEN.replace("k4s4", "K4S4")
    path = project(tmp_path, recipe("sd", LORA + TOKEN + other), "sd")
    result = compiled(path, said("<k4s4> <K4S4>"))
    assert codes(result) == ["duplicate-id"]
    assert "small letters" in result.diagnostics[0].message


def test_words_alone_are_learned_to_the_end(tmp_path: Path) -> None:
    path = project(tmp_path, recipe("sd", ALONE + '\n[embeddings]\nuntil = "50%"\n' + TOKEN), "sd")
    (fault,) = compiled(path).diagnostics
    assert fault.code == "conflict" and fault.path == "embeddings.until"
    assert compiled(path, 'embeddings.until="100%"', memory_model=FixedMemory()).plan is not None


def test_without_an_adapter(tmp_path: Path) -> None:
    (fault,) = compiled(project(tmp_path, recipe("sd", TOKEN), "sd")).diagnostics
    assert fault.code == "conflict" and "textual-inversion" in fault.help


def test_an_inversion_of_nothing(tmp_path: Path) -> None:
    assert codes(compiled(project(tmp_path, recipe("sd", ALONE), "sd"))) == ["conflict"]


def test_an_inversion_has_no_layers(tmp_path: Path) -> None:
    path = project(tmp_path, recipe("sd", ALONE + 'targets = "attention"\n' + TOKEN), "sd")
    assert codes(compiled(path)) == ["no-effect"]


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_pipelines_without_a_loader(family: str, tmp_path: Path) -> None:
    (fault,) = compiled(project(tmp_path, recipe(family, LORA + TOKEN), family)).diagnostics
    assert fault.code == "not-in-family" and "Stable Diffusion XL" in fault.help


def test_one_word_three_times_that_no_caption_says(tmp_path: Path) -> None:
    """One message for each that is too many, and one for the captions."""
    path = project(tmp_path, recipe("sd", LORA + 3 * TOKEN), "sd")
    result = compiled(path, said("no"))
    assert sorted(codes(result)) == ["duplicate-id", "duplicate-id", "no-effect"]


def test_more_to_start_from_than_there_are_vectors(tmp_path: Path) -> None:
    words = TOKEN + 'vectors = 2\ninitial = "a white cat"\n'
    result = compiled(project(tmp_path, recipe("sd", LORA + words), "sd"))
    (fault,) = result.diagnostics
    assert (fault.code, fault.severity) == ("no-effect", "warning")
    assert fault.path == "embeddings.token[0].initial" and fault.help.startswith("vectors = 3")


@pytest.mark.parametrize("table", ["embeddings", "train.text_encoders"])
def test_an_end_behind_the_run_s(pivotal: Path, table: str) -> None:
    result = compiled(pivotal, f'{table}.until="9999 steps"', memory_model=FixedMemory())
    (fault,) = [each for each in result.diagnostics if each.path.endswith("until")]
    assert (fault.code, fault.severity) == ("no-effect", "warning")
    assert result.plan is not None and "steps, so `until` leaves off nothing" in fault.message
