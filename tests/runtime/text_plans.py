"""Tiny plans that train text encoders, and what their runs leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image
from torch import Tensor

from compiler.adapters import CLIP_TARGETS
from compiler.data.manifest import Manifest
from compiler.families import FAMILIES
from compiler.plan import Layout, Plan, Text, TextTraining
from runtime import checkpoints
from runtime.batch import Batch
from runtime.build import build
from runtime.events import Silent
from runtime.execute import execute
from runtime.export.pictures import pictures
from runtime.export.request import chosen
from runtime.families import family_of
from runtime.families.common import encode_prompts
from runtime.methods.base import Built
from runtime.text_training import tokenizers
from tests.runtime.families.test_sd import objective
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.tiny import make_tiny

CPU = torch.device("cpu")
SEVERAL = ["a photo of a sks dog", "", "red circle on blue"]
TRAINING = sorted(name for name, card in FAMILIES.items() if card.trainable_encoders)
TARGET = {"unet": (r".*\.attn\d\.to_[qkv]",), "transformer": (r".*\.attn\.to_[qkv]",)}
STEPS = 4
RUNS = ["sd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "sd3", "sdxl"))]
Planned = Callable[..., tuple[Plan, Manifest]]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """Plans on a tiny base of a family, all of whose CLIPs are trained."""
    root: Path = tmp_path_factory.mktemp("text")

    def make(family: str, name: str, whole: bool = False, **changes: Any) -> Any:
        folder, card = root / family, FAMILIES[family]
        if not folder.exists():
            make_tiny(family, folder)
            draw_data(root / f"{family}-dog", ((64, 64),) * 3)
        if card.prediction != "flow":
            changes = {"objective": objective(), **changes}
        share, until, steps = changes.pop("te", 1.0), changes.pop("until", 0), STEPS
        plan, manifest = tiny_plan(
            family, folder, root / f"{family}-dog", root / f"{family}-{name}", steps=steps, lr=3e-2
        )
        assert plan.adapter is not None
        adapter = evolve(
            plan.adapter,
            kind=changes.pop("kind", "lora"),
            targets=TARGET[card.trained_component],
            init="kaiming",
        )
        facts = TextTraining(
            encoders=card.trainable_encoders,
            adapter=None if whole else evolve(adapter, rank=3, targets=CLIP_TARGETS["all-linear"]),
            lr=share * plan.optimizer.lr,
            until=until or steps,
        )
        text = Text(
            max_length=77 if card.prompt_length == 77 else 32,
            instruction=(),
            zeros_for_empty=card.zeros_for_empty,
        )
        given = {"text": text, "adapter": None if whole else adapter, "ema": None, **changes}
        return evolve(plan, text_training=facts, **given), manifest

    return make


def built_of(plan: Plan) -> Built:
    """The model and its encoders, as a run has them."""
    given = (plan.model, plan.adapter, plan.precision, Layout(), family_of(plan.model.family), CPU)
    return build(*given, empty=False, seed=plan.seed, text_training=plan.text_training)


def batch_of(plan: Plan, prompts: list[str], cached: dict[str, Tensor]) -> Batch:
    """A batch of noise with these prompts, of which `cached` are the embeddings."""
    family = family_of(plan.model.family)
    torch.manual_seed(4)
    made = family.example_batch(plan.model, 64, 64, len(prompts), plan.text, CPU)
    speller = tokenizers(plan, family)
    assert speller is not None
    return evolve(
        made,
        latents=torch.randn_like(made.latents),
        noise=torch.randn_like(made.noise),
        sigmas=torch.linspace(0.2, 0.8, len(prompts)),
        text={**made.text, **cached},
        tokens=speller.batch(prompts),
    )


def stock_of(plan: Plan) -> Any:
    """The base by plain Diffusers, encoders included."""
    card = FAMILIES[plan.model.family]
    stock = getattr(diffusers, card.pipeline).from_pretrained(plan.model.base)
    stock.set_progress_bar_config(disable=True)
    return stock


def built_stock(plan: Plan, folder: Path) -> Any:
    """The pipeline in `folder`."""
    stock = getattr(diffusers, FAMILIES[plan.model.family].pipeline).from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    return stock


def wanted_of(plan: Plan) -> Any:
    """The validation picture once more."""
    return pictures(chosen(Path(plan.run_folder)), [plan.validation.prompts[0].text])


@torch.no_grad()
def cached_of(plan: Plan, stock: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Embeddings as the run caches them: one prompt at a time, joined."""
    family = family_of(plan.model.family)
    return family.collate_text(
        [encode_prompts(family, stock.components, [p], plan.text)[0] for p in prompts]
    )


def final_weights(plan: Plan) -> dict[str, Tensor]:
    """What was trained, in the last checkpoint."""
    saved = checkpoints.latest(Path(plan.run_folder) / "checkpoints")
    assert saved is not None
    return dict(checkpoints.load(saved).weights)


def drawn(plan: Plan, step: int) -> Any:
    """The picture after `step` updates, as numbers."""
    (path,) = Path(plan.run_folder, "samples", f"step-{step:06d}").glob("*.png")
    return np.asarray(Image.open(path))


def pictured(plan: Plan, stock: Any) -> Any:
    """The validation picture by a stock pipeline, as numbers."""
    validation = plan.validation
    width, height = validation.sizes[0]
    scale = {FAMILIES[plan.model.family].guidance_argument: validation.guidance}
    length = {} if plan.text.max_length == 77 else {"max_sequence_length": plan.text.max_length}
    picture = stock(
        validation.prompts[0].text,
        **scale,
        **length,
        num_inference_steps=validation.steps,
        width=width,
        height=height,
        generator=torch.Generator("cpu").manual_seed(validation.seeds[0]),
    ).images[0]
    return np.asarray(picture)


def states(plan: Plan, manifest: Manifest) -> Iterator[dict[str, Tensor]]:
    """What was trained, after each step."""
    plan = evolve(plan, checkpoints=evolve(plan.checkpoints, every=1, keep=0))
    assert execute(plan, manifest, Silent()).status == "finished"
    for step in range(1, STEPS + 1):
        folder = checkpoints.folder_of(Path(plan.run_folder) / "checkpoints", step)
        yield dict(checkpoints.load(folder).weights)
