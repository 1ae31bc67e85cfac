"""Bases that were distilled into few steps: how they are drawn with, and what to train instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiler.compile import Compiled
from compiler.families import FAMILIES
from compiler.families.card import KnownModel
from tests.compiler.recipes import GPU, RECIPE, FixedMemory, codes, compiled, make_base, project

# As their model cards say: the steps and the guidance that one draws with, and the model that each
# was made from.
PUBLISHED = {
    "stabilityai/stable-diffusion-3.5-large-turbo": (
        4,
        0.0,
        "stabilityai/stable-diffusion-3.5-large",
    ),
    "black-forest-labs/FLUX.1-schnell": (4, 0.0, "black-forest-labs/FLUX.1-dev"),
    "black-forest-labs/FLUX.2-klein-4B": (4, 1.0, "black-forest-labs/FLUX.2-klein-base-4B"),
    "black-forest-labs/FLUX.2-klein-9B": (4, 1.0, "black-forest-labs/FLUX.2-klein-base-9B"),
    "Tongyi-MAI/Z-Image-Turbo": (9, 0.0, "Tongyi-MAI/Z-Image"),
    "stabilityai/sdxl-turbo": (4, 0.0, "stabilityai/stable-diffusion-xl-base-1.0"),
    "stabilityai/sd-turbo": (4, 0.0, "stabilityai/stable-diffusion-2-1"),
}
KNOWN: dict[str, tuple[str, KnownModel]] = {
    known.base: (card.name, known) for card in FAMILIES.values() for known in card.known
}


def told(folder: Path, family: str, base: str, more: str = "") -> Compiled:
    """The plan of training `base`, with `more` of a recipe."""
    text = RECIPE.replace('family = "sana"\nbase = "base"', f'family = "{family}"\nbase = "{base}"')
    text += '[validation]\nevery = "1 epoch"\nprompts = { a = "a dog" }\n' + more
    path = project(folder, text)
    return compiled(path, memory_model=FixedMemory(), machine=GPU)


@pytest.mark.parametrize("base", PUBLISHED)
def test_a_distilled_base_is_drawn_with_as_published_and_warned_of(
    base: str, tmp_path: Path
) -> None:
    steps, guidance, instead = PUBLISHED[base]
    family, _ = KNOWN[base]
    result = told(tmp_path, family, base, '[adapter]\nkind = "lora"\n')
    assert codes(result) == ["distilled-base"] and result.plan is not None
    warning = result.diagnostics[0]
    assert warning.severity == "warning" and warning.path == "model.base"
    assert f"{steps} steps" in warning.message and f'base = "{instead}"' in warning.help
    validation = result.plan.validation
    assert (validation.steps, validation.guidance) == (steps, guidance)


def test_what_to_train_instead_is_known_and_of_the_same_family() -> None:
    stated = {base: known.undistilled for base, (_, known) in KNOWN.items() if known.undistilled}
    assert stated == {base: instead for base, (*_, instead) in PUBLISHED.items()}
    for base, instead in stated.items():
        assert KNOWN[instead][0] == KNOWN[base][0] and not KNOWN[instead][1].undistilled


@pytest.mark.parametrize("base", sorted({instead for *_, instead in PUBLISHED.values()}))
def test_what_to_train_instead_is_not_warned_of(base: str, tmp_path: Path) -> None:
    assert "distilled-base" not in codes(told(tmp_path, KNOWN[base][0], base))


def test_the_adapter_is_spoken_of_only_where_there_is_one(tmp_path: Path) -> None:
    base = "black-forest-labs/FLUX.1-schnell"
    with_one = told(tmp_path / "a", "flux", base, '[adapter]\nkind = "lora"\n')
    assert "loaded into this one" in with_one.diagnostics[0].help
    assert "loaded into this one" not in told(tmp_path / "b", "flux", base).diagnostics[0].help


def klein(folder: Path, **changed: object) -> Path:
    """A folder of the distilled model, which its index tells; `changed` are keys of its
    transformer's configuration."""
    base = make_base(folder, "flux2")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    place = base / "transformer" / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "pooled": False, **changed}))
    return base


def test_a_folder_is_told_by_its_index_and_its_configuration(tmp_path: Path) -> None:
    result = told(tmp_path / "run", "flux2", str(klein(tmp_path / "four")))
    fault = next(fault for fault in result.diagnostics if fault.code == "distilled-base")
    assert 'base = "black-forest-labs/FLUX.2-klein-base-4B"' in fault.help
    large = klein(
        tmp_path / "other", num_layers=8, num_single_layers=24, num_attention_heads=32,
        joint_attention_dim=12288,
    )  # fmt: skip
    fault = next(
        fault
        for fault in told(tmp_path / "run2", "flux2", str(large)).diagnostics
        if fault.code == "distilled-base"
    )
    assert 'base = "black-forest-labs/FLUX.2-klein-base-9B"' in fault.help
    odd = klein(tmp_path / "odd", num_layers=2)
    fault = next(
        fault
        for fault in told(tmp_path / "run3", "flux2", str(odd)).diagnostics
        if fault.code == "distilled-base"
    )
    assert "base =" not in fault.help and "made from" in fault.help


@pytest.mark.parametrize(
    ("family", "base"),
    [(KNOWN[base][0], base) for base in PUBLISHED] + [
        ("flux", "black-forest-labs/FLUX.1-dev"),
        ("z_image", "Tongyi-MAI/Z-Image"),
        ("flux2", "black-forest-labs/FLUX.2-klein-base-4B"),
        ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("sd", "stabilityai/stable-diffusion-2-base"),
    ],
)  # fmt: skip
def test_a_folder_of_a_published_model_is_drawn_with_and_warned_of_likewise(
    family: str, base: str, tmp_path: Path
) -> None:
    """All but 3.5 Large Turbo, whose files say nothing that those of 3.5 Large do not."""
    known = KNOWN[base][1]
    folder = make_base(tmp_path / "folder", family)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **known.index}))
    trained = FAMILIES[family].trained_component
    for name, file in ((trained, "config.json"), ("scheduler", "scheduler_config.json")):
        text = json.dumps({**known.configs[name], "added": None})
        (folder / name / file).write_text(text)
    result = told(tmp_path / "run", family, str(folder))
    assert result.plan is not None
    validation = result.plan.validation
    if base not in PUBLISHED or base.endswith("3.5-large-turbo"):
        assert "distilled-base" not in codes(result)
        card = FAMILIES[family]
        assert (validation.steps, validation.guidance) == (card.inference_steps, card.guidance)
        return
    fault = next(fault for fault in result.diagnostics if fault.code == "distilled-base")
    assert f'base = "{PUBLISHED[base][2]}"' in fault.help
    assert (validation.steps, validation.guidance) == PUBLISHED[base][:2]
