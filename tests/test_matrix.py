"""Every family x method x number format x checkpointing, on tiny models: what a person does.

A recipe is compiled, trained for three steps, killed off in the middle and gone on with. The result
is loaded by Diffusers' own pipeline, and draws the picture that the run drew.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from compiler.compile import Compiled
from compiler.data.manifest import Manifest
from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from compiler.plan import Plan
from runtime.events import Silent
from runtime.execute import execute
from tests.compiler.recipes import MACHINE, compiled, make_pictures
from tests.runtime.tiny import make_tiny

RECIPE = """\
name = "{name}"
seed = 3
output = "runs"
[model]
family = "{family}"
base = "base"
{adapter}
[data]
resolution = 64
[[data.source]]
path = "pictures"
captions = {{ from = "instance", prompt = "a photo of sks dog", dropout = 0.2 }}
[train]
steps = 3
batch_size = 2
optimizer = {{ name = "adamw", lr = 1e-2 }}
[precision]
compute = "{compute}"
[memory]
activation_checkpointing = {checkpointing}
[checkpoints]
every = "1 steps"
[validation]
every = "off"
at_start = false
prompts = {{ dog = "a photo of sks dog" }}
sizes = ["64x64"]
guidance = 3.0
{drawing}
seed = 11
[cache]
path = "cache"
"""
LORA = '[adapter]\nkind = "lora"\nrank = 2\n'
CASES = {  # adapter, compute, checkpointing
    "lora": (LORA, "fp32", 0),
    "lora-bf16": (LORA, "bf16", 1),
    "full": ("", "fp32", 1),
    "full-bf16": ("", "bf16", 0),
}

WHOLE = ("sana", "sd", "sd3")  # all cases; of others each method and each number format once
PAIRS = [
    (family, case)
    for number, family in enumerate(sorted(FAMILIES))
    for place, case in enumerate(CASES)
    if family in WHOLE or place in ((0, 3), (1, 2))[number % 2]
]
FIRST = "pictures/000.png"  # what is refined, by a family that draws nothing by itself


def refines(folder: Path) -> bool:
    """Whether the family that a folder is called by refines a picture."""
    return FAMILIES[folder.name].refines > 0


class Killed(Exception):
    """In the middle of a run."""


class KillAfter(Silent):
    """Ends the run after some steps, as it comes."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, metrics: Any) -> None:
        """Counts."""
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base of each family, and pictures."""
    folder: Path = tmp_path_factory.mktemp(request.param) / request.param
    make_tiny(request.param, folder / "base")
    make_pictures(folder / "pictures", [(64, 64), (80, 64), (64, 96)])
    return folder


def planned(folder: Path, name: str, case: str) -> tuple[Plan, Manifest]:
    adapter, compute, checkpointing = CASES[case]
    path = folder / f"{name}.toml"
    path.write_text(
        RECIPE.format(
            name=name,
            family=folder.name,
            adapter=adapter,
            compute=compute,
            checkpointing=checkpointing,
            drawing=f'steps = 7\npicture = "{FIRST}"' if refines(folder) else "steps = 2",
        )
    )
    result: Compiled = compiled(path, machine=MACHINE)
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    return result.plan, result.manifest


@pytest.mark.parametrize(("family", "case"), PAIRS, indirect=["family"])
def test_plans_runs_resumes_and_loads(family: Path, case: str) -> None:
    whole, manifest = planned(family, f"{case}-whole", case)
    assert execute(whole, manifest, Silent()).status == "finished"
    halted, manifest = planned(family, f"{case}-halted", case)
    with pytest.raises(Killed):
        execute(halted, manifest, KillAfter(2))
    assert execute(halted, manifest, Silent()).status == "finished"
    results = [weights(Path(plan.run_folder)) for plan in (whole, halted)]
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    check_picture(family, whole, case)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the result's trained component, by file and name."""
    files = sorted((run / "lora").rglob("*.safetensors"))
    files += sorted(f for part in ("transformer", "unet") for f in (run / "model" / part).glob("*"))
    found = {
        f"{file.stem}/{key}": tensor
        for file in files
        if file.suffix == ".safetensors"
        for key, tensor in load_file(file).items()
    }
    assert found
    return found


def load_lora(pipeline: Any, card: FamilyCard, folder: Path) -> None:
    """As a person does."""
    if card.lora_loader == "pipeline":
        pipeline.load_lora_weights(folder)
        return
    trained = getattr(pipeline, card.trained_component)
    setattr(pipeline, card.trained_component, PeftModel.from_pretrained(trained, folder))


def check_picture(family: Path, plan: Plan, case: str) -> None:
    """Diffusers alone draws what the run drew, up to rounding of its last bits."""
    run, card = Path(plan.run_folder), FAMILIES[family.name]
    dtype = torch.bfloat16 if "bf16" in case else torch.float32
    kind = getattr(diffusers, card.pipeline)
    if "lora" in case:
        pipeline = kind.from_pretrained(family / "base", dtype=dtype)
        load_lora(pipeline, card, run / "lora")
    else:
        pipeline = kind.from_pretrained(run / "model", dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.__call__).parameters
    options: dict[str, Any] = {}
    if "use_resolution_binning" in known:
        options = {"use_resolution_binning": False}
    if card.guidance_argument == "true_cfg_scale":
        options |= {"negative_prompt": ""}
    if refines(family):
        with Image.open(family / FIRST) as first:
            options |= {"image": first.convert("RGB"), "num_inference_steps": 7}
    else:
        options |= {"width": 64, "height": 64, "num_inference_steps": 2}
    drawn = pipeline(
        prompt="a photo of sks dog",
        **{card.guidance_argument: 3.0},
        generator=torch.Generator("cpu").manual_seed(11),
        **options,
    ).images[0]
    (ours,) = (run / "samples").rglob("*.png")
    with Image.open(ours) as image:
        found = np.asarray(image.convert("RGB"), np.float32)
    difference = np.abs(found - np.asarray(drawn, np.float32))
    assert found.std() > 1, "a picture without contrast proves nothing"
    # The pipeline's VAE runs in bf16 too, ours in its own float32.
    assert difference.mean() < (6.0 if dtype == torch.bfloat16 else 0.05), difference.mean()
