"""The whole path as a person takes it, on real photographs: plan, run, kill, run again, load.

In processes that are started anew for one family, in forks of this one for the other.
Two subjects of the DreamBooth data, as two concepts with their own prompts and repeats. The result
is loaded by a process that imports Diffusers and nothing of ours.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime.anew import Anew
from tests.runtime.forked import Forked
from tests.runtime.tiny import make_tiny
from tuner.cli import run_command

STEPS = 24
KILL_AFTER = 5  # steps; the last checkpoint is then at step 4
SEED = 42
SAMPLING_STEPS = 4

RECIPE = """\
name = "{family}"
seed = 7
output = "runs"

[model]
family = "{family}"
base = "base"
{adapter}
[data]
resolution = 64

[[data.source]]
id = "dog"
path = "{dog}"
repeats = 2
captions = {{ from = "instance", prompt = "a photo of sks dog" }}

[[data.source]]
id = "backpack"
path = "{backpack}"
repeats = 1.5
captions = {{ from = "instance", prompt = "a photo of zwx backpack", dropout = 0.1 }}

[train]
steps = {steps}
batch_size = 2
accumulate = 2
optimizer = {{ name = "adamw", lr = 2e-2 }}
schedule = {{ name = "cosine", warmup = "10%" }}

[checkpoints]
every = "2 steps"

[validation]
every = "off"
prompts = {{ dog = "a photo of sks dog" }}
sizes = ["64x64"]
guidance = 3.0
steps = {sampling}
seed = {seed}

[track]
to = ["tensorboard"]

[cache]
path = "cache"
"""

ADAPTER = """
[adapter]
kind = "lora"
rank = 8
alpha = 4
"""

# What a person writes who has never heard of tuner.
LOAD = f"""\
import sys, torch, diffusers
kind, base, result, picture = sys.argv[1:]
torch.set_num_threads(1)
if kind == "sd3":
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(base)
    pipe.load_lora_weights(result)
else:
    pipe = diffusers.SanaPipeline.from_pretrained(result)
arguments = dict(use_resolution_binning=False) if kind == "sana" else dict()
pipe("a photo of sks dog", width=64, height=64, guidance_scale=3.0,
     num_inference_steps={SAMPLING_STEPS}, generator=torch.Generator("cpu").manual_seed({SEED}),
     **arguments).images[0].save(picture)
assert not set(("tuner", "runtime", "compiler")) & set(sys.modules)
"""


Process = Forked | Anew


def tuner(*arguments: str, cwd: Path, anew: bool) -> Process:
    """A process; what it says goes to the files `out` and `err` in `cwd`."""

    def work() -> int:
        os.chdir(cwd)
        return run_command(arguments)

    out, err = cwd / "out", cwd / "err"
    if not anew:
        return Forked(work, out, err)
    return Anew(arguments, module="tuner", cwd=cwd, out=out, err=err)


def rows(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_in_training(process: Process, run: Path) -> None:
    """Kill the run, without warning, once `KILL_AFTER` steps are on record."""
    deadline = time.monotonic() + 250
    while len(rows(run)) < KILL_AFTER and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert KILL_AFTER <= len(rows(run)) < STEPS


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "adapter"), [("sd3", ADAPTER), ("sana", "")])
def test_two_concepts_killed_and_finished(
    family: str, adapter: str, data_root: Path, tmp_path: Path
) -> None:
    make_tiny(family, tmp_path / "base")
    photographs = data_root / "dreambooth"
    (tmp_path / "recipe.toml").write_text(
        RECIPE.format(
            family=family,
            adapter=adapter,
            dog=photographs / "dog",
            backpack=photographs / "backpack",
            steps=STEPS,
            sampling=SAMPLING_STEPS,
            seed=SEED,
        )
    )
    planned = tuner("plan", "recipe.toml", "--json", cwd=tmp_path, anew=False)
    assert planned.wait() == 0, (tmp_path / "err").read_text()
    plan = json.loads((tmp_path / "out").read_text())
    dogs, packs = (len(list((photographs / name).glob("*.jpg"))) for name in ("dog", "backpack"))
    batches = sum(bucket["batches"] for bucket in plan["buckets"])
    assert sum(b["samples"] for b in plan["buckets"]) >= 2 * dogs + 1.5 * packs
    assert plan["steps"]["per_epoch"] == -(-batches // 2) and plan["steps"]["total"] == STEPS

    run = tmp_path / "runs" / family
    anew = family == "sd3"
    kill_in_training(tuner("run", "recipe.toml", cwd=tmp_path, anew=anew), run)
    finished = tuner("run", "recipe.toml", cwd=tmp_path, anew=anew)
    assert finished.wait() == 0, (tmp_path / "err").read_text()
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    assert (run / "report.html").stat().st_size > 10_000
    assert "Traceback" not in (tmp_path / "err").read_text()

    result = run / ("lora" if adapter else "model")
    picture = tmp_path / "loaded.png"
    out, err = tmp_path / "loaded", tmp_path / "loaded-err"
    arguments = [family, tmp_path / "base", result, picture]
    assert Anew(arguments, code=LOAD, cwd=tmp_path, out=out, err=err).wait() == 0, err.read_text()
    own = pixels(run / "samples" / f"step-{STEPS:06}" / f"dog-64x64-{SEED}.png")
    base = pixels(run / "samples" / "step-000000" / f"dog-64x64-{SEED}.png")
    assert np.abs(pixels(picture) - own).max() <= 1  # eight-bit rounding
    assert np.abs(base - own).max() > 5
