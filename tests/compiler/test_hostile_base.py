"""A base folder that is damaged or meant badly is refused with a sentence, whatever it holds."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from compiler.compile import Compiled
from tests.compiler.recipes import RECIPE, FixedMemory, compiled, project


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("vae", "encoder_block_out_channels"),
        ("vae", "latent_channels"),
        ("transformer", "patch_size"),
        ("text_encoder", "hidden_size"),
        ("scheduler", "flow_shift"),
        ("transformer", "sample_size"),
    ],
)
@pytest.mark.parametrize(
    "value", [None, "x", -1, 0, 10**30, [], {}, [[]], float("nan"), True, 1e-320]
)
def test_configurations_never_raise(tmp_path: Path, component: str, key: str, value: Any) -> None:
    path = project(tmp_path)
    file = "scheduler_config.json" if component == "scheduler" else "config.json"
    place = tmp_path / "base" / component / file
    config = json.loads(place.read_text()) | {key: value}
    config.pop("block_out_channels", None)
    place.write_text(json.dumps(config))
    found = compiled(path, memory_model=FixedMemory())
    if found.plan is None:
        assert {fault.code for fault in found.diagnostics} & {"not-a-pipeline", "out-of-range"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 4) + b"nul",
        struct.pack("<Q", 40) + b'{"a": {"shape": ["x", 2]}, "b": [], "c": 3 }',
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
)  # fmt: skip
def test_weights_never_raise(tmp_path: Path, content: bytes) -> None:
    path = project(tmp_path)
    (tmp_path / "base" / "transformer" / "model.safetensors").write_bytes(content)
    assert compiled(path, memory_model=FixedMemory()).plan is not None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"_class_name": 3}', "[" * 100_000, "\0"])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    path = project(tmp_path)
    (tmp_path / "base" / "model_index.json").write_text(content)
    found = compiled(path)
    assert [fault.code for fault in found.diagnostics] in (["not-a-pipeline"], ["wrong-family"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    path = project(tmp_path)
    os.mkfifo(tmp_path / "prompts.toml")
    found = compiled(path, 'validation.prompts="prompts.toml"')
    assert [fault.code for fault in found.diagnostics] == ["missing-path"]
    assert "not a regular file" in found.diagnostics[0].message
    (tmp_path / "base" / "model_index.json").unlink()
    os.mkfifo(tmp_path / "base" / "model_index.json")
    assert [fault.code for fault in compiled(path).diagnostics] == ["not-a-pipeline"]


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "/proc/self/mem", "/", "loop"])
def test_devices_and_loops_are_no_prompts(tmp_path: Path, place: str) -> None:
    path = project(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    found = compiled(path, f'validation.prompts="{place}"')
    assert [fault.code for fault in found.diagnostics] == ["missing-path"]


def test_a_whole_disk_is_never_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scanned(*_: object, **__: object) -> None:
        raise AssertionError("nothing should be listed")

    monkeypatch.setattr("compiler.passes.places.scan", scanned)
    found = compiled(project(tmp_path), 'data.source[0].path="/"')
    assert {fault.code for fault in found.diagnostics} == {"data-not-apart"}
    assert "would lie in the data folder `/`" in found.diagnostics[0].message


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ('output="pictures"', "output"),
        ('output="pictures/deep/er"', "output"),
        ('cache.path="pictures/cache"', "cache.path"),
        ('data.source[0].path="."', "data.source[0].path"),
        ('data.source[0].path="runs/try/samples"', "data.source[0].path"),
    ],
)
def test_data_and_results_are_kept_apart(tmp_path: Path, change: str, path: str) -> None:
    (tmp_path / "runs" / "try" / "samples").mkdir(parents=True)
    found = compiled(project(tmp_path), change)
    assert {fault.code for fault in found.diagnostics} == {"data-not-apart"}
    assert path in {fault.path for fault in found.diagnostics}


def test_a_plan_asks_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object, **__: object) -> None:
        raise AssertionError("a plan opens no socket")

    monkeypatch.setattr("socket.socket", connect)
    path = project(tmp_path)
    assert compiled(path, memory_model=FixedMemory()).plan is not None
    hub = 'model.base="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"'
    assert compiled(path, hub, memory_model=FixedMemory()).plan is not None
    assert compiled(path, 'model.base="someone/else"').plan is None


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "sigma_max": 80.0}
EULER = {"_class_name": "EulerDiscreteScheduler", **BETAS}
STATISTICS = {"latents_mean": [-1.7, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2]}


@pytest.mark.parametrize(
    ("family", "scheduler", "vae", "why"),
    [
        ("sdxl", EDM, {}, "EDMDPMSolverMultistepScheduler"),
        ("sdxl", {"_class_name": "EDMEulerScheduler"}, {}, "EDMEulerScheduler"),
        ("sdxl", FLOW, {}, "FlowMatchEulerDiscreteScheduler"),
        ("sdxl", EULER | {"timestep_type": "continuous"}, {}, "no table of betas"),
        ("sdxl", EULER, STATISTICS, "latents_mean"),
        ("sd", EULER, {"latents_std": [1.0] * 4}, "latents_std"),
        ("sd3", EULER, {}, "EulerDiscreteScheduler"),
        ("flux", {"_class_name": "DPMSolverMultistepScheduler"}, {}, "DPMSolverMultistepScheduler"),
        ("sana", EDM, {}, "EDMDPMSolverMultistepScheduler"),
    ],
)
def test_a_base_of_other_noise_or_other_latents_is_refused(
    tmp_path: Path, family: str, scheduler: dict[str, Any], vae: dict[str, Any], why: str
) -> None:
    """The first is how a folder of Playground 2.5 says that it is no SDXL."""
    found = _with_configs(tmp_path, family, scheduler, vae)
    assert [fault.code for fault in found.diagnostics] == ["not-a-pipeline"]
    assert why in found.diagnostics[0].message


@pytest.mark.parametrize(
    ("family", "scheduler", "vae"),
    [
        ("sdxl", EULER, dict.fromkeys(STATISTICS)),
        ("sdxl", {**BETAS, "_class_name": "DDIMScheduler"}, {}),
        ("sd3", FLOW, {}),
        ("sana", {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, {}),
        ("qwen_image", FLOW, {}),  # whose vae has statistics
    ],
)
def test_a_base_with_another_sampler_is_fine(
    tmp_path: Path, family: str, scheduler: dict[str, Any], vae: dict[str, Any]
) -> None:
    assert _with_configs(tmp_path, family, scheduler, vae).plan is not None


def _with_configs(
    folder: Path, family: str, scheduler: dict[str, Any], vae: dict[str, Any]
) -> Compiled:
    recipe = RECIPE.replace('"sana"', f'"{family}"')
    path, base = project(folder, recipe, family=family), folder / "base"
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    place = base / "vae" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | vae))
    return compiled(path, memory_model=FixedMemory())
