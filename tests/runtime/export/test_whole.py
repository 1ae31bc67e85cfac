"""Whole models in one file: written as published, read by Diffusers and by ourselves.

The two directions are checked against Diffusers' own readers of such files, which know neither our
names nor our configurations: what they load is the folder, tensor by tensor, and draws its picture.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file

from compiler.families import FAMILIES
from compiler.plan import Model, Plan
from runtime.errors import RunFailed
from runtime.events import Silent
from runtime.execute import execute
from runtime.export.base import base_tensors
from runtime.export.conventions import SINGLE_FILE
from runtime.export.export import export
from runtime.export.lazy import write
from runtime.export.metadata import PUBLISHED
from runtime.export.request import Refused, chosen, requested
from runtime.export.whole import TRAINED, laid_out
from runtime.families import family_of
from runtime.families.common import copy_component
from tests.compiler.recipes import compiled, make_pictures
from tests.runtime.export.runs import SD35, pipeline_of
from tests.runtime.tiny import make_tiny, tiny_model

CPU = torch.device("cpu")
WHOLE = [name for name, card in FAMILIES.items() if card.whole_file]
PROMPT = "a photo of sks dog"


def components(family: str) -> tuple[str, ...]:
    """Those that are compared: Diffusers reads a Flux.1 and a Lumina 2 of the published width only,
    which test_flux.py and test_split_files.py compare."""
    whole = FAMILIES[family].whole_file
    assert whole is not None
    wide = [("flux", "transformer"), ("lumina2", "transformer")]
    return tuple(name for name in whole.parts if (family, name) not in wide)


def all_of_it(family: str) -> bool:
    """Whether a file can hold the text encoders too, so that Diffusers makes a pipeline of it."""
    return set(FAMILIES[family].text_encoders) <= set(components(family))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Model]]:
    """By family: a tiny folder, the same in one file, and what a plan says of that file."""
    root = tmp_path_factory.mktemp("whole")
    made = {}
    for family in WHOLE:
        folder, file = root / family, root / f"{family}.safetensors"
        make_tiny(family, folder, **(SD35 if family == "sd3" else {}))
        model = tiny_model(family, folder)
        found = laid_out(model, base_tensors(model, 0), everything=True, dtype=None)
        write(file, found, {})
        parts = tuple(
            evolve(part, file=str(file)) if part.name in components(family) else part
            for part in model.components
        )
        bare = root / f"{family}-bare"  # configurations and tokenizers alone
        shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
        made[family] = (folder, file, evolve(model, base=str(bare), components=parts))
    return made


def stock(family: str, folder: Path) -> Any:
    return getattr(diffusers, FAMILIES[family].pipeline).from_pretrained(folder)


def same(one: Any, other: Any) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("family", [f for f in WHOLE if all_of_it(f)])
def test_diffusers_reads_the_file_as_the_folder(
    family: str, world: dict[str, tuple[Path, Path, Model]]
) -> None:
    folder, file, model = world[family]
    cls: Any = getattr(diffusers, FAMILIES[family].pipeline)
    options = {
        name: value
        for name, value in FAMILIES[family].pipeline_options.items()
        if name != "requires_safety_checker"
    }
    wanted = stock(family, folder)
    if family == "flux":
        options["transformer"] = wanted.transformer
    read = cls.from_single_file(str(file), config=model.base, **options)
    for name in components(family):
        mine, theirs = read.components[name].state_dict(), wanted.components[name].state_dict()
        assert mine.keys() == theirs.keys()
        # Diffusers takes the first CLIP's projection of the newer files for the identity.
        free = {"text_projection.weight"} if name == "text_encoder" else set()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine.keys() - free)


@pytest.mark.parametrize("family", WHOLE)
def test_the_file_is_loaded_as_the_folder(
    family: str, world: dict[str, tuple[Path, Path, Model]], tmp_path: Path
) -> None:
    folder, _, model = world[family]
    wanted, own = stock(family, folder), family_of(family)
    for name in components(family):
        loaded = own.load(model, name, torch.float32, CPU)
        assert same(loaded, wanted.components[name]), name
    if "vae" in components(family):
        copied = stock_component(model, "vae", tmp_path)
        assert same(copied, wanted.vae)


def stock_component(model: Model, name: str, folder: Path) -> Any:
    assert copy_component(model, name, Path(model.base), folder)
    return diffusers.AutoencoderKL.from_pretrained(folder / name)


RECIPE = """\
name = "x"
output = "runs"
[model]
family = "{family}"
base = "{base}"
{more}
[adapter]
kind = "lora"
rank = 2
[data]
resolution = 64
[[data.source]]
path = "pictures"
captions = {{ from = "instance", prompt = "a photo of sks dog" }}
[train]
steps = 2
optimizer = {{ name = "adamw", lr = 1e-2 }}
[precision]
compute = "fp32"
"""


def recipe(folder: Path, family: str, base: Path | str, more: str = "") -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(family=family, base=base, more=more))
    if not (folder / "pictures").exists():
        make_pictures(folder / "pictures", [(64, 64)] * 2)
    return path


def test_a_run_on_the_file_is_the_run_on_the_folder(
    world: dict[str, tuple[Path, Path, Model]], tmp_path: Path
) -> None:
    """From the recipe to the trained weights; and its merged model draws the same."""
    folder, file, bare = world["sdxl"]
    plans = []
    for number, (base, more) in enumerate(((folder, ""), (file, f'rest = "{bare.base}"'))):
        place = tmp_path / str(number)
        place.mkdir()
        result = compiled(recipe(place, "sdxl", base, more))
        assert result.plan is not None and result.manifest is not None, result.diagnostics
        assert execute(result.plan, result.manifest, Silent()).status == "finished"
        plans.append(result.plan)
    assert {part.name for part in plans[1].model.components if part.file} == set(components("sdxl"))
    one, other = (
        load_file(Path(plan.run_folder) / "lora/pytorch_lora_weights.safetensors") for plan in plans
    )
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    merged = [exported(plan, tmp_path / f"{n}-merged", merge=True) for n, plan in enumerate(plans)]
    pictures = [drawn(stock("sdxl", place)) for place in merged]
    assert np.array_equal(*pictures)
    assert np.abs(pictures[0] - drawn(stock("sdxl", folder))).max() > 1e-3  # the LoRA shows


def exported(plan: Plan, out: Path, **options: Any) -> Path:
    return export(requested(chosen(Path(plan.run_folder)), out=out, **options))


@torch.no_grad()
def drawn(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPT,
        width=64,
        height=64,
        num_inference_steps=2,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="np",
    ).images
    return np.asarray(images[0])


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_merged_model_in_one_file_draws_the_same(runs: Any, family: str, tmp_path: Path) -> None:
    plan = runs(family)
    folder = exported(plan, tmp_path / "merged", merge=True)
    file = exported(plan, tmp_path / "one.safetensors", merge=True, single_file=True)
    cls: Any = getattr(diffusers, FAMILIES[family].pipeline)
    options = {"safety_checker": None} if family == "sd" else {}
    read = cls.from_single_file(str(file), config=plan.model.base, **options)
    assert np.array_equal(drawn(read), drawn(pipeline_of(plan, folder)))


def test_text_encoders_are_written_where_they_are_asked_for(runs: Any, tmp_path: Path) -> None:
    plan = runs("sd3")
    bare = load_file(
        exported(plan, tmp_path / "bare.safetensors", merge=True, single_file=True)
    ).keys()
    more: dict[str, Any] = {"merge": True, "single_file": True, "everything": True}
    whole = load_file(exported(plan, tmp_path / "whole.safetensors", **more)).keys()
    assert bare < whole
    added = {key.split(".")[1] for key in whole - bare}
    assert added == {"clip_l", "clip_g", "t5xxl"}
    with pytest.raises(Refused, match="a folder holds all components"):
        exported(plan, tmp_path / "x", merge=True, everything=True)


def test_a_file_that_lacks_tensors_is_said(
    world: dict[str, tuple[Path, Path, Model]], tmp_path: Path
) -> None:
    _, file, model = world["sdxl"]
    tensors = load_file(file)
    gone = "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.bias"
    del tensors[gone]
    save_file(tensors, tmp_path / "less.safetensors")
    parts = tuple(evolve(p, file=str(tmp_path / "less.safetensors")) for p in model.components)
    with pytest.raises(RunFailed, match=r"lacks 1 tensors, such as .*layers\.0\.mlp\.fc1\.bias"):
        family_of("sdxl").load(
            evolve(model, components=parts), "text_encoder_2", torch.float32, CPU
        )


@pytest.mark.parametrize("name", ["unet", "text_encoder_2"])
def test_quantised_as_the_folder_would_be(
    name: str, world: dict[str, tuple[Path, Path, Model]]
) -> None:
    folder, _, of_file = world["sdxl"]
    found = []
    for model in (tiny_model("sdxl", folder), of_file):
        parts = tuple(
            evolve(part, quantize="int8") if part.name == name else part
            for part in model.components
        )
        quantised = evolve(model, components=parts)
        found.append(family_of("sdxl").load(quantised, name, torch.float32, CPU))
    assert any("codes" in key for key in found[0].state_dict())
    assert same(*found)


def test_what_a_model_predicts_is_said_in_its_file(tmp_path: Path) -> None:
    """And a file that says so is not taken for one that predicts noise."""
    folder = make_tiny("sdxl", tmp_path / "v", prediction_type="v_prediction")
    model = tiny_model("sdxl", folder)
    file = tmp_path / "v.safetensors"
    write(file, laid_out(model, base_tensors(model, 0), everything=False, dtype=None), {})
    assert load_file(file)["v_pred"].shape == (0,)
    noise = make_tiny("sdxl", tmp_path / "noise")
    for rest, code in ((folder, None), (noise, "not-a-pipeline")):
        result = compiled(recipe(tmp_path, "sdxl", file, f'rest = "{rest}"'))
        found = {d.code for d in result.diagnostics if d.severity == "error"}
        assert found == ({code} if code else set())


def test_each_layout_is_written_and_has_a_source() -> None:
    assert set(WHOLE) == TRAINED.keys() == SINGLE_FILE.keys()
    assert SINGLE_FILE.keys() <= PUBLISHED.keys()
