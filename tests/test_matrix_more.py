"""The matrix of what only some families have: new words, text encoders that are trained, the
distillation of Sana, norms; and LoKr with lengths of rows apart, which all have.

As in `test_matrix.py` a recipe is compiled and trained for three steps; what was there in the
middle is gone on with, to the same bits; Diffusers loads the result and draws the run's picture.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from compiler.adapters import INVERSION, RESULTS
from compiler.data.manifest import Manifest
from compiler.families import FAMILIES
from compiler.plan import Plan
from runtime.execute import execute
from runtime.new_tokens import FOLDER, file_of
from tests.compiler.recipes import MACHINE, compiled, make_pictures
from tests.runtime.tiny import make_tiny
from tests.test_matrix import (
    LORA,
    PROMPT,
    CopyAfter,
    adapted,
    goes_on,
    loaded,
    pictured,
    told,
    untaught,
)

WORD = '\n[[embeddings.token]]\nname = "<k4>"\nvectors = 2\n'
WORDS = PROMPT.replace("sks", "<k4>")
TEXT = "\n[train.text_encoders]\n"
TABLES = {  # the recipe's first table, and its last
    "inversion": ('[adapter]\nkind = "textual-inversion"\n', WORD),
    "pivotal": (LORA, WORD),
    "text": (LORA, TEXT),
    "text-dylora": (adapted("dylora"), TEXT),
    "text-model": ("", TEXT),
    "text-pivotal": (LORA, WORD + TEXT),
    "sprint": ("[sprint]\n", ""),
    "decomposed": (adapted("lokr") + "weight_decompose = true\n", ""),
    "norms": (adapted("loha") + "train_norm = true\n", ""),
}


def families_of(case: str) -> list[str]:
    """Those that have it."""
    cards = FAMILIES.items()
    if case in ("inversion", "pivotal"):
        return [name for name, card in cards if card.embedding_keys]
    if case == "text-pivotal":
        return [name for name, card in cards if card.embedding_keys and card.trainable_encoders]
    if case in ("text", "text-dylora", "text-model"):
        return [name for name, card in cards if card.trainable_encoders]
    if case == "norms":
        return [name for name, card in cards if card.trained_component == "unet"]
    return ["sana"] if case == "sprint" else list(FAMILIES)


EVERY = [
    (family, case, compute, checkpointing)
    for case in TABLES
    for family, compute, checkpointing in product(families_of(case), ("fp32", "bf16"), (0, 1))
]
SOME = [
    ("sd", "inversion", "fp32", 1),
    ("sd", "text-pivotal", "fp32", 0),
    ("sana", "sprint", "fp32", 0),
]
CASES = EVERY if os.environ.get("TUNER_WHOLE_MATRIX") else SOME


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base of each family, and pictures."""
    folder: Path = tmp_path_factory.mktemp(request.param) / request.param
    make_tiny(request.param, folder / "base")
    make_pictures(folder / "pictures", [(64, 64), (80, 64), (64, 96)])
    return folder


def test_the_cases_are_there() -> None:
    assert set(SOME) <= set(EVERY) and len(EVERY) > 100


@pytest.mark.parametrize(("family", "case", "compute", "checkpointing"), CASES, indirect=["family"])
def test_plans_runs_resumes_and_loads(
    family: Path, case: str, compute: str, checkpointing: int
) -> None:
    given = (case, compute, checkpointing)
    plan, manifest = planned(family, f"{case}-{compute}-{checkpointing}", *given)
    copied = CopyAfter(plan, 2)
    assert execute(plan, manifest, copied).status == "finished"
    ended = tensors(Path(plan.run_folder))
    check_picture(family, plan)
    goes_on(plan, manifest, copied, drawn=False)
    again = tensors(Path(plan.run_folder))
    assert again.keys() == ended.keys() and ended
    assert all(torch.equal(tensor, again[name]) for name, tensor in ended.items())


def planned(
    folder: Path, name: str, case: str, compute: str, checkpointing: int
) -> tuple[Plan, Manifest]:
    first, last = TABLES[case]
    text = told(folder, name, first, compute, checkpointing)
    path = folder / f"{name}.toml"
    path.write_text((text.replace(PROMPT, WORDS) if "[[embeddings" in last else text) + last)
    result = compiled(path, machine=MACHINE)
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    return result.plan, result.manifest


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the result, by file and name; the base's own components are in no checkpoint
    and compare equal."""
    files = [f for name in RESULTS for f in sorted((run / name).rglob("*.safetensors"))]
    return {
        f"{file.relative_to(run)}/{key}": tensor
        for file in files
        for key, tensor in load_file(file).items()
    }


def by_diffusers(family: Path, plan: Plan, dtype: torch.dtype) -> Any:
    """The result in Diffusers' own pipeline, with the words that it learned."""
    run, card = Path(plan.run_folder), FAMILIES[family.name]
    if plan.sprint is not None:
        return diffusers.DiffusionPipeline.from_pretrained(run / "model", dtype=dtype)
    alone = plan.adapter is not None and plan.adapter.kind == INVERSION
    if alone:
        kind = getattr(diffusers, card.pipeline)
        pipeline = kind.from_pretrained(family / "base", dtype=dtype)
    else:
        pipeline = loaded(family, plan, dtype)
    if (facts := plan.embeddings) is not None:
        folder = run / INVERSION if alone else run / "lora" / FOLDER
        (token,) = facts.tokens
        held = load_file(folder / file_of(facts, token))
        for encoder in facts.encoders:
            pipeline.load_textual_inversion(
                held[card.embedding_keys[encoder] or token.token],
                token=token.token,
                text_encoder=getattr(pipeline, encoder),
                tokenizer=getattr(pipeline, encoder.replace("text_encoder", "tokenizer")),
            )
    return pipeline


def check_picture(family: Path, plan: Plan) -> None:
    """Diffusers alone draws what the run drew, and something else without the result."""
    run, exact = Path(plan.run_folder), plan.precision.compute == "float32"
    prompt = WORDS if plan.embeddings is not None else PROMPT
    dtype = torch.float32 if exact else torch.bfloat16
    pipeline = by_diffusers(family, plan, dtype)
    drawn = pictured(family, pipeline, prompt)
    (ours,) = (run / "samples").rglob("*.png")
    with Image.open(ours) as image:
        found = np.asarray(image.convert("RGB"), np.float32)
    assert found.std() > 1, "a picture without contrast proves nothing"
    difference = np.abs(found - drawn).mean()
    assert difference < (0.05 if exact else 2.0), difference
    untrained = untaught(family, dtype, prompt)
    changed = np.abs(found - untrained).mean()
    assert changed > max(0.01, (4 if exact else 2) * difference), (changed, difference)
