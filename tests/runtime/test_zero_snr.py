"""A model that is trained up to pure noise is sampled from there, by Diffusers' own scheduler."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from compiler.noise import ZERO_SNR
from compiler.plan import Plan
from runtime.events import Silent
from runtime.execute import execute
from runtime.export.export import export
from runtime.export.request import chosen, requested
from tests.compiler.recipes import MACHINE, codes, compiled, make_pictures
from tests.runtime.tiny import make_tiny
from tests.test_matrix import LORA, pictured, told

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER = {**BETAS, "prediction_type": "v_prediction", "steps_offset": 1, "clip_sample": False}
WANTED = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that predicts v and stops short of pure noise, as Stable Diffusion 2.1."""
    folder: Path = tmp_path_factory.mktemp("zero") / "sd"
    make_tiny("sd", folder / "base")
    make_pictures(folder / "pictures", [(64, 64), (64, 64)])
    diffusers.DDIMScheduler(**SCHEDULER).save_pretrained(folder / "base" / "scheduler")
    index = folder / "base" / "model_index.json"
    stated = json.loads(index.read_text()) | {"scheduler": ["diffusers", "DDIMScheduler"]}
    index.write_text(json.dumps(stated))
    return folder


def planned(folder: Path, name: str, adapter: str, setting: str = "true") -> Any:
    path = folder / f"{name}.toml"
    noise = f"noise = {{ zero_terminal_snr = {setting} }}\n[precision]"
    path.write_text(told(folder, name, adapter, "fp32", 0).replace("[precision]", noise))
    return compiled(path, machine=MACHINE)


def trained(folder: Path, name: str, adapter: str) -> Plan:
    result = planned(folder, name, adapter)
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    assert execute(result.plan, result.manifest, Silent()).status == "finished"
    found: Plan = result.plan
    return found


def scheduler_of(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model / "scheduler/scheduler_config.json").read_text())
    return found


def test_a_whole_model_brings_a_scheduler_that_samples_as_it_was_trained(folder: Path) -> None:
    run = Path(trained(folder, "whole", "").run_folder)
    before, after = scheduler_of(folder / "base"), scheduler_of(run / "model")
    assert after == before | WANTED and after != before
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(run / "model")
    (ours,) = (run / "samples").rglob("*.png")
    with Image.open(ours) as image:
        found = np.asarray(image.convert("RGB"), np.float32)
    assert np.abs(found - pictured(folder, pipeline)).mean() < 0.05
    pipeline.scheduler = diffusers.DDIMScheduler(**SCHEDULER)
    assert np.abs(found - pictured(folder, pipeline)).mean() > 1


def test_a_lora_says_how_to_sample_and_brings_it_when_merged(folder: Path) -> None:
    result = planned(folder, "lora", LORA)
    assert codes(result) == ["shift-differs"]
    (warning,) = result.diagnostics
    assert "DDIMScheduler.from_config" in warning.help
    assert 'rescale_betas_zero_snr=True, timestep_spacing="trailing"' in warning.help
    run = Path(trained(folder, "lora", LORA).run_folder)
    merged = export(requested(chosen(run), merge=True, out=run / "merged"))
    assert scheduler_of(merged) == scheduler_of(folder / "base") | WANTED


def test_a_sampler_that_can_not_begin_at_pure_noise_is_named(folder: Path) -> None:
    place = folder / "base" / "scheduler" / "scheduler_config.json"
    before = place.read_text()
    place.write_text(json.dumps(json.loads(before) | {"_class_name": "HeunDiscreteScheduler"}))
    try:
        result = planned(folder, "heun", "")
    finally:
        place.write_text(before)
    assert codes(result) == ["shift-differs"]
    assert "DDIMScheduler.from_config" in result.diagnostics[0].help


def test_as_the_base_is_no_matter(folder: Path) -> None:
    result = planned(folder, "plain", "", "false")
    assert codes(result) == [] and result.plan is not None
    assert json.loads(result.plan.model.configs["scheduler"]) == scheduler_of(folder / "base")


def test_the_schedulers_that_are_said_to_know_it_do() -> None:
    for name in ZERO_SNR:
        known = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert {"rescale_betas_zero_snr", "timestep_spacing"} <= set(known), name
