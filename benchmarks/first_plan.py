"""How long a first plan takes: nothing simulated before, all libraries imported, on this machine.

Stable Diffusion 3.5 Large, LoRA of rank 64, batch 4 at 1024 pixels: once with every setting stated,
then with all of them left open and fitted to cards of several sizes. Wall and CPU seconds of whole
processes, the least and the median of several runs; a repeated plan beside them.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

RUNS = 3
CARDS = ("80 GiB", "24 GiB", "16 GiB", "12 GiB", "8 GiB")
RECIPE = """\
name = "first"
[model]
family = "sd3"
base = "stabilityai/stable-diffusion-3.5-large"
{model}
[adapter]
kind = "lora"
rank = 64
[memory]
{memory}
[[data.source]]
path = "pictures"
captions = {{ from = "instance", prompt = "a photo of sks dog" }}
[train]
epochs = 30
batch_size = 4
optimizer = {{ lr = 1e-4{optimizer} }}
[validation]
prompts = {{ dog = "a photo of sks dog on a beach" }}
[launch]
device = "cuda"
"""
OPEN = '[model.transformer]\nquantize = "auto"\n[model.text_encoder_3]\nquantize = "auto"'


def main() -> None:
    """Print the table."""
    print(f"{'':<34}{'first, s':>18}{'CPU, s':>9}{'again, s':>10}")
    _row(
        "every setting stated",
        RECIPE.format(
            model="",
            memory='budget = "none"\nactivation_checkpointing = 1\nmicro_batch = 4\n'
            'fused_backward = false\noffload = "none"',
            optimizer=', name = "adamw"',
        ),
    )
    for card in CARDS:
        text = RECIPE.format(model=OPEN, memory=f'budget = "{card}"', optimizer="")
        _row(f"fitted to {card}", text)


def _row(name: str, recipe: str) -> None:
    walls, cpus, again = [], [], []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            (place / "recipe.toml").write_text(recipe)
            (place / "pictures").mkdir()
            for number in range(8):
                Image.new("RGB", (1024, 1024)).save(place / "pictures" / f"{number}.png")
            wall, cpu = _plan(place)
            walls.append(wall)
            cpus.append(cpu)
            again.append(_plan(place)[0])
    spread = f"{min(walls):.1f} ({statistics.median(walls):.1f})"
    print(f"{name:<34}{spread:>18}{min(cpus):>9.1f}{min(again):>10.2f}", flush=True)


def _plan(folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of `tuner plan`."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "tuner", "plan", str(folder / "recipe.toml")],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
