"""Finished tiny runs to export from, and pictures by plain Diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from attrs import evolve

from compiler.families import FAMILIES
from compiler.plan import Plan, Scaled
from runtime.events import Silent
from runtime.execute import execute
from tests.runtime.plans import LORA, PICTURES, draw_data, tiny_plan
from tests.runtime.tiny import make_tiny

SD35: dict[str, Any] = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
EVERYTHING: dict[str, tuple[str, ...]] = {
    "flux": FAMILIES["flux"].target_sets["all-linear"],
    "sd3": FAMILIES["sd3"].target_sets["all-linear"],
    "sd": FAMILIES["sd"].target_sets["all-linear"],
    "sdxl": FAMILIES["sdxl"].target_sets["all-linear"],
    "pixart": FAMILIES["pixart"].target_sets["all-linear"],
    "sana": (r"transformer_blocks\.\d+\.attn\d\.to_[qkv]", r"transformer_blocks\.\d+\.ff\..*point"),
}
PROMPT = "a photo of sks dog"
VALIDATION = evolve(PICTURES, negative="a cat", seeds=(42, 43), every=0, at_start=False)


def finished(folder: Path, family: str, *, full: bool = False, **changes: Any) -> Plan:
    """Train a tiny pipeline for four steps in `folder`; alpha is not the rank, nor the same for
    all that other programs have in one layer."""
    base = folder / f"{family}-base"
    if not base.exists():
        make_tiny(family, base, **(SD35 if family == "sd3" else {}))
        draw_data(folder / "dog", ((64, 64),) * 4)
    keys = (Scaled(pattern=r".*(to_k|add_k_proj)", alpha=1.0),)
    adapter = evolve(LORA, rank=2, alpha=3.0, alphas=keys, targets=EVERYTHING[family])
    name = f"{family}-{'full' if full else 'lora'}" + "".join(f"-{key}" for key in changes)
    name += f"-{sum(1 for _ in folder.glob(f'{name}*'))}"  # another's run, with other values
    settings: dict[str, Any] = {
        "adapter": None if full else adapter,
        "lr": 3e-2,
        "every": 2,
        "validation": VALIDATION,
        **changes,
    }
    plan, manifest = tiny_plan(family, base, folder / "dog", folder / name, steps=4, **settings)
    assert execute(plan, manifest, Silent()).status == "finished"
    return plan


def pipeline_of(plan: Plan, folder: Path | None = None) -> Any:
    """The stock pipeline with the base's weights, or with those in `folder`."""
    cls = getattr(diffusers, FAMILIES[plan.model.family].pipeline)
    pipeline = cls.from_pretrained(folder or plan.model.base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def drawn(pipeline: Any) -> np.ndarray:
    """One picture, (H, W, 3) in 0 to 1."""
    extra = (
        {} if "StableDiffusion3" in type(pipeline).__name__ else {"use_resolution_binning": False}
    )
    images = pipeline(
        PROMPT,
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(1),
        max_sequence_length=32,
        output_type="np",
        **extra,
    ).images
    return np.asarray(images[0])
