"""Every family x method x adapter x number format x checkpointing, on tiny models: what a person
does.

A recipe is compiled and trained for three steps. What was there in the middle, as a kill would have
left it, is gone on with, to the same bits. The result
is loaded by Diffusers' own pipeline, and draws the picture that the run drew. Diffusers loads LoRA
and DoRA as they are, and of other adapters the merged model; where their own files load is in
`tests/runtime/methods/test_kinds.py`.

A part of the matrix is in every run of the tests. All of it, more than 500 cases, is where
TUNER_WHOLE_MATRIX is set: `just test-matrix`. What only some families have is in
`test_matrix_more.py`.
"""

from __future__ import annotations

import inspect
import os
import shutil
import time
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from compiler.adapters import LAYERED, LORAS, AdapterKind
from compiler.compile import Compiled
from compiler.data.manifest import Manifest
from compiler.families import FAMILIES
from compiler.plan import Plan
from runtime import checkpoints
from runtime.context import result_folder
from runtime.events import Silent
from runtime.execute import execute
from runtime.export.export import export
from runtime.export.request import chosen, requested
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

SIZES = {
    "dylora": "rank = 2\nblock_size = 1\n",
    "ia3": "",
    "full": "",
    "oft": "block_size = 4\n",
    "boft": "block_size = 4\n",
}


def adapted(kind: AdapterKind) -> str:
    """A small adapter, in a recipe's words."""
    size = SIZES.get(kind, "rank = 2\n")
    return f'[adapter]\nkind = "{kind}"\n{size}'


METHODS: dict[str, str] = {"model": "", **{kind: adapted(kind) for kind in LAYERED}}
EVERY = {
    f"{method}-{compute}-{checkpointing}": (METHODS[method], compute, checkpointing)
    for method, compute, checkpointing in product(METHODS, ("fp32", "bf16"), (0, 1))
}
WHOLE = ("sd",)  # all of CASES; of others each method and each number format once
PAIRS = [
    (family, case)
    for number, family in enumerate(sorted(FAMILIES))
    for place, case in enumerate(CASES)
    if family in WHOLE or place in ((0, 3), (1, 2))[number % 2]
]
if os.environ.get("TUNER_WHOLE_MATRIX"):  # half an hour
    CASES, PAIRS = CASES | EVERY, list(product(sorted(FAMILIES), EVERY))
PROMPT = "a photo of sks dog"  # of the recipe
FIRST = "pictures/000.png"  # what is refined, by a family that draws nothing by itself


def refines(folder: Path) -> bool:
    """Whether the family that a folder is called by refines a picture."""
    return FAMILIES[folder.name].refines > 0


class CopyAfter(Silent):
    """Copies the run's folder when some steps are done and those before are saved."""

    def __init__(self, plan: Plan, steps: int) -> None:
        self.run, self.steps, self.left = Path(plan.run_folder), steps, steps
        self.copy = self.run.with_name(f"{self.run.name}-copy")

    def step(self, metrics: Any) -> None:
        """Counts."""
        self.left -= 1
        if self.left == 0:
            until = time.monotonic() + 60
            while not checkpoints.complete(self.run / "checkpoints")[self.steps - 2 :]:
                assert time.monotonic() < until, "nothing was saved"
                time.sleep(0.005)
            shutil.copytree(self.run, self.copy)


class UntilDrawn(Silent):
    """Ends the run, as it comes, when its result is written and the pictures begin."""

    def phase(self, name: str, total: int, unit: str) -> None:
        """Looks."""
        if name == "validate":
            raise Killed


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


def told(folder: Path, name: str, adapter: str, compute: str, checkpointing: int) -> str:
    """The recipe's text."""
    text = RECIPE.format(
        name=name,
        family=folder.name,
        adapter=adapter,
        compute=compute,
        checkpointing=checkpointing,
        drawing=f'steps = 7\npicture = "{FIRST}"' if refines(folder) else "steps = 2",
    )
    # In three steps at less than this an adapter moves a picture no more than rounding does; one
    # that has a factor an output alone has to move further.
    rate = "5e-1" if '"ia3"' in adapter else "1e-1"
    return text.replace("lr = 1e-2", f"lr = {rate}") if adapter else text


def planned(folder: Path, name: str, case: str) -> tuple[Plan, Manifest]:
    path = folder / f"{name}.toml"
    path.write_text(told(folder, name, *CASES[case]))
    result: Compiled = compiled(path, machine=MACHINE)
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    return result.plan, result.manifest


@pytest.mark.parametrize(("family", "case"), PAIRS, indirect=["family"])
def test_plans_runs_resumes_and_loads(family: Path, case: str) -> None:
    plan, manifest = planned(family, case, case)
    copied = CopyAfter(plan, 2)
    assert execute(plan, manifest, copied).status == "finished"
    ended = weights(Path(plan.run_folder))
    check_picture(family, plan)
    goes_on(plan, manifest, copied, drawn=False)
    again = weights(Path(plan.run_folder))
    assert again.keys() == ended.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ended.items())


def goes_on(plan: Plan, manifest: Manifest, copied: CopyAfter, *, drawn: bool = True) -> None:
    """Finish the run from what was there in its middle, in its place; `drawn`: with pictures."""
    shutil.rmtree(copied.run)
    copied.copy.rename(copied.run)
    assert not result_folder(plan).exists()
    done = checkpoints.complete(copied.run / "checkpoints")
    assert [checkpoints.read_state(each)["step"] for each in done] == [copied.steps - 1]
    if drawn:
        assert execute(plan, manifest, Silent()).status == "finished"
        return
    with pytest.raises(Killed):
        execute(plan, manifest, UntilDrawn())


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the result's trained component, by file and name."""
    files = [f for kind in LAYERED for f in sorted((run / kind).rglob("*.safetensors"))]
    files += sorted(f for part in ("transformer", "unet") for f in (run / "model" / part).glob("*"))
    found = {
        f"{file.stem}/{key}": tensor
        for file in files
        if file.suffix == ".safetensors"
        for key, tensor in load_file(file).items()
    }
    assert found
    return found


def loaded(family: Path, plan: Plan, dtype: torch.dtype) -> Any:
    """The result in Diffusers' pipeline, as a person loads it."""
    run, card = Path(plan.run_folder), FAMILIES[family.name]
    kind = getattr(diffusers, card.pipeline)
    if plan.adapter is None:
        return kind.from_pretrained(run / "model", dtype=dtype)
    if plan.adapter.kind not in LORAS:
        merged = export(requested(chosen(run), merge=True, out=run / "merged"))
        return kind.from_pretrained(merged, dtype=dtype)
    pipeline = kind.from_pretrained(family / "base", dtype=dtype)
    if card.lora_loader == "pipeline":
        pipeline.load_lora_weights(run / plan.adapter.kind)
        return pipeline
    trained = getattr(pipeline, card.trained_component)
    adapted = PeftModel.from_pretrained(trained, run / plan.adapter.kind)
    setattr(pipeline, card.trained_component, adapted)
    return pipeline


def pictured(family: Path, pipeline: Any, prompt: str = PROMPT) -> np.ndarray[Any, Any]:
    """What Diffusers draws, as the recipe has it drawn."""
    card = FAMILIES[family.name]
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
        prompt=prompt,
        **{card.guidance_argument: 3.0},
        generator=torch.Generator("cpu").manual_seed(11),
        **options,
    ).images[0]
    return np.asarray(drawn, np.float32)


@cache
def untaught(family: Path, dtype: torch.dtype, prompt: str = PROMPT) -> np.ndarray[Any, Any]:
    """What Diffusers draws by the base, the same for all cases of a family."""
    base = getattr(diffusers, FAMILIES[family.name].pipeline)
    return pictured(family, base.from_pretrained(family / "base", dtype=dtype), prompt)


def check_picture(family: Path, plan: Plan) -> None:
    """Diffusers alone draws what the run drew, up to rounding of its last bits; it would not, had
    nothing been loaded."""
    run = Path(plan.run_folder)
    exact = plan.precision.compute == "float32"
    dtype = torch.float32 if exact else torch.bfloat16
    drawn = pictured(family, loaded(family, plan, dtype))
    (ours,) = (run / "samples").rglob("*.png")
    with Image.open(ours) as image:
        found = np.asarray(image.convert("RGB"), np.float32)
    assert found.std() > 1, "a picture without contrast proves nothing"
    # The pipeline's VAE runs in bf16 too, ours in its own float32.
    difference = np.abs(found - drawn).mean()
    assert difference < (0.05 if exact else 2.0), difference
    untrained = untaught(family, dtype)
    changed = np.abs(found - untrained).mean()
    assert changed > max(0.01, (4 if exact else 2) * difference), (changed, difference)
