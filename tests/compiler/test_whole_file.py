"""A base that is one file: known by the names and shapes in its header, which is all there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiler.compile import Compiled
from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from tests.compiler.recipes import FixedMemory, compiled, held_file, make_pictures

WHOLE = [name for name, card in FAMILIES.items() if card.whole_file]
RECIPE = """\
name = "x"
[model]
family = "{family}"
base = "{base}"
{more}
[data]
resolution = 64
[[data.source]]
path = "pictures"
captions = {{ from = "instance", prompt = "x" }}
[adapter]
kind = "lora"
[train]
steps = 1
optimizer = {{ lr = 1e-4 }}
[memory]
budget = "none"
"""


def planned(folder: Path, family: str, base: str, more: str = "") -> Compiled:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(family=family, base=base, more=more))
    if not (folder / "pictures").exists():
        make_pictures(folder / "pictures", [(64, 64)])
    return compiled(path, memory_model=FixedMemory())


def usual(family: str) -> tuple[str, ...]:
    """Components that published files hold."""
    card: FamilyCard = FAMILIES[family]
    assert card.whole_file is not None
    return card.whole_file.usual


@pytest.mark.parametrize("family", WHOLE)
def test_published_files_are_recognised(family: str, tmp_path: Path) -> None:
    """Each is of the model that it was made of, or of one with the same configurations."""
    for number, known in enumerate(FAMILIES[family].known):
        file = held_file(tmp_path / f"{number}.safetensors", family, known.base, *usual(family))
        result = planned(tmp_path, family, file.name, f'rest = "{known.base}"')
        assert result.plan is not None, result.diagnostics
        assert not [d for d in result.diagnostics if d.code == "single-file"]
        model = result.plan.model
        assert model.base == known.base and not model.local
        held = {part.name for part in model.components if part.file}
        assert held == set(usual(family))
        assert all(part.file in (None, str(file)) for part in model.components)
        counts = {part.name: part.parameters for part in model.components if part.parameters}
        assert counts == dict(known.parameters)

        guessed = planned(tmp_path, family, file.name)
        assert guessed.plan is not None, guessed.diagnostics
        said = [d for d in guessed.diagnostics if d.code == "single-file"]
        other = next(k for k in FAMILIES[family].known if k.base == guessed.plan.model.base)
        made_of_it = known.undistilled == other.base  # and its file tells nothing of its few steps
        assert said or other.configs == known.configs or made_of_it


def test_what_the_shapes_leave_open_is_said(tmp_path: Path) -> None:
    """Version 2 of Stable Diffusion predicts noise or v with tensors of one shape."""
    held_file(tmp_path / "v2.safetensors", "sd", "stabilityai/stable-diffusion-2-1", *usual("sd"))
    result = planned(tmp_path, "sd", "v2.safetensors")
    (said,) = [d for d in result.diagnostics if d.code == "single-file"]
    assert "stabilityai/stable-diffusion-2`" in said.message or "-2-1" in said.message
    assert said.severity == "warning" and said.help.startswith("say `rest = ")


def test_what_the_file_lacks_comes_from_the_rest(tmp_path: Path) -> None:
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    parts = ("unet", "text_encoder", "text_encoder_2")
    held_file(tmp_path / "bare.safetensors", "sdxl", base, *parts)
    result = planned(tmp_path, "sdxl", "bare.safetensors")
    assert result.plan is not None
    (said,) = [d for d in result.diagnostics if d.code == "single-file"]
    assert "holds no vae" in said.message
    files = {part.name for part in result.plan.model.components if part.file}
    assert files == set(parts)


def test_a_file_of_its_own_goes_before(tmp_path: Path) -> None:
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    held_file(tmp_path / "a.safetensors", "sdxl", base)
    found = planned(tmp_path, "sdxl", "a.safetensors", 'unet.file = "gone.safetensors"')
    assert [d.code for d in found.diagnostics if d.severity == "error"] == ["missing-path"]


@pytest.mark.parametrize("family", WHOLE)
def test_files_of_other_families_are_named(family: str, tmp_path: Path) -> None:
    other = next(name for name in WHOLE if name != family)
    base = FAMILIES[other].known[0].base
    held_file(tmp_path / "other.safetensors", other, base, *usual(other))
    result = planned(tmp_path, family, "other.safetensors")
    (fault,) = [d for d in result.diagnostics if d.severity == "error"]
    assert fault.code == "wrong-family" and fault.help == f'say `family = "{other}"`'


def header_file(path: Path, *names: str) -> None:
    entries = {name: {"dtype": "F16", "shape": [8, 8], "data_offsets": [0, 0]} for name in names}
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    ("family", "base", "more", "code", "words"),
    [
        ("sdxl", "lora.safetensors", "", "not-a-pipeline", "holds no unet of Stable Diffusion XL"),
        ("sdxl", "fp8.safetensors", "", "not-a-pipeline", "are quantised"),
        ("sdxl", "text.safetensors", "", "not-a-pipeline", "is no safetensors file"),
        ("sdxl", "v.safetensors", "", "not-a-pipeline", "says that it predicts v (`v_pred`)"),
        ("sana", "xl.safetensors", "", "not-a-pipeline", "needs a folder"),
        ("sdxl", "gone.safetensors", "", "missing-path", "there is no file"),
        ("sdxl", "models/a.safetensors", 'rest = "b/c"', "missing-path", "there is no file"),
        ("sdxl", "a/b/c.safetensors", "", "missing-path", "its header is needed"),
        ("sdxl", "xl.safetensors", 'rest = "a/b"', "unknown-model", "no model that sdxl knows"),
        ("sdxl", "xl.safetensors", 'rest = "gone"', "missing-path", "there is no folder"),
        (
            "sd",
            "v1.safetensors",
            'rest = "stabilityai/stable-diffusion-2"',
            "not-a-pipeline",
            "not",
        ),
        (
            "sdxl",
            "stabilityai/stable-diffusion-xl-base-1.0",
            'rest = "stabilityai/stable-diffusion-xl-base-1.0"',
            "no-effect",
            "is no file",
        ),
    ],
)
def test_faults(family: str, base: str, more: str, code: str, words: str, tmp_path: Path) -> None:
    xl = "stabilityai/stable-diffusion-xl-base-1.0"
    held_file(tmp_path / "xl.safetensors", "sdxl", xl)
    held_file(tmp_path / "v1.safetensors", "sd", "CompVis/stable-diffusion-v1-4")
    held_file(tmp_path / "v.safetensors", "sdxl", xl)
    content = json.loads((tmp_path / "v.safetensors").read_bytes()[8:])
    content["v_pred"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps(content).encode()
    (tmp_path / "v.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    header_file(tmp_path / "lora.safetensors", "lora_unet_x.lora_down.weight")
    header_file(tmp_path / "fp8.safetensors", "a.scale_weight")
    (tmp_path / "text.safetensors").write_text("no")
    result = planned(tmp_path, family, base, more)
    (fault,) = [d for d in result.diagnostics if d.severity == "error"]
    assert fault.code == code and words in fault.message
    assert fault.help and fault.span is not None
