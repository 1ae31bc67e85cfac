"""How long the simulation of one candidate takes.

Stable Diffusion 3.5 Large, LoRA of rank 64, batch 4 at 1024 pixels, pictures of the same size.
Of each candidate: wall and CPU seconds alone (nothing simulated before, libraries imported), the
least and the median of several runs, and wall seconds after the others of one search. Beside them
two measures of the machine, taken in the same run: ten million additions in Python, and what it
takes a new interpreter to import the libraries.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from attrs import evolve
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.first_plan import RECIPE
from compiler.memory import Candidate, Simulation
from compiler.plan import Quantisation
from runtime.collector import collector_off
from runtime.memory.simulate import RuntimeMemoryModel
from tuner.compiling import compile_here

RUNS = 5
MEMORY = (
    'budget = "none"\nactivation_checkpointing = 0\nmicro_batch = 4\n'
    'fused_backward = false\noffload = "none"'
)


def main() -> None:
    """Print the table."""
    plain = _captured()
    with collector_off():
        _measure(plain)  # first calls
        print(f"{'':<46}{'alone, s':>16}{'CPU, s':>8}{'after, s':>10}{'additions, s':>14}")
        shared, additions = RuntimeMemoryModel(), []
        shared.simulate(plain)
        for name, candidate in _candidates(plain).items():
            found = [_measure(candidate) for _ in range(RUNS)]
            additions.append(_additions())
            start = time.perf_counter()
            shared.simulate(candidate)
            after = time.perf_counter() - start
            walls = [wall for wall, _ in found]
            spread = f"{min(walls):.2f} ({statistics.median(walls):.2f})"
            cpu = min(cpu for _, cpu in found)
            print(
                f"{name:<46}{spread:>16}{cpu:>8.2f}{after:>10.2f}{additions[-1]:>14.2f}", flush=True
            )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, peft, diffusers"], capture_output=True)
    print(
        f"ten million additions in Python: {min(additions):.2f} s, median"
        f" {statistics.median(additions):.2f}; imports {time.perf_counter() - start:.1f} s"
    )


def _captured() -> Candidate:
    """The recipe's, with every setting stated."""
    seen: list[Candidate] = []

    class Recorder(RuntimeMemoryModel):
        def simulate(self, candidate: Candidate) -> Simulation:
            seen.append(candidate)
            return super().simulate(candidate)

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        recipe = RECIPE.format(model="", memory=MEMORY, optimizer=', name = "adamw"')
        (place / "recipe.toml").write_text(recipe)
        (place / "pictures").mkdir()
        for number in range(8):
            Image.new("RGB", (1024, 1024)).save(place / "pictures" / f"{number}.png")
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")  # or it is known from the last time
        compile_here(place / "recipe.toml", [], simulator=Recorder())
    return seen[0]


def _candidates(plain: Candidate) -> dict[str, Candidate]:
    def laid_out(**changes: Any) -> Candidate:
        return evolve(plain, layout=evolve(plain.layout, **changes))

    def quantised(candidate: Candidate, kind: Quantisation) -> Candidate:
        model = candidate.model
        parts = tuple(
            evolve(c, quantize=kind) if c.name == model.trained_component else c
            for c in model.components
        )
        return evolve(candidate, model=evolve(model, components=parts))

    aside = laid_out(offload_activations=True, activation_checkpointing=2, offload_blocks=13)
    every = laid_out(activation_checkpointing=1)
    least = laid_out(offload_activations=True, activation_checkpointing=1, offload_blocks=38)
    return {
        "nothing saved": plain,
        **{f"every {n}. block recomputed": laid_out(activation_checkpointing=n) for n in (4, 3, 2)},
        "every block recomputed": every,
        **{
            f"and {n} of 38 blocks wait": laid_out(activation_checkpointing=1, offload_blocks=n)
            for n in (9, 10, 13, 19, 38)
        },
        "in int8": quantised(every, "int8"),
        "in nf4": quantised(every, "nf4"),
        "activations wait": laid_out(offload_activations=True),
        "and 13 blocks, every 2. block recomputed": aside,
        "the same in nf4": quantised(aside, "nf4"),
        "all waits, all recomputed, nf4, in 4 parts": evolve(
            quantised(least, "nf4"), micro_batch=1
        ),
    }


def _measure(candidate: Candidate) -> tuple[float, float]:
    """Wall and CPU seconds of a model that knows nothing."""
    import resource

    def spent() -> float:
        used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    model = RuntimeMemoryModel()
    start, before = time.perf_counter(), spent()
    model.simulate(candidate)
    return time.perf_counter() - start, spent() - before


def _additions() -> float:
    start, total = time.perf_counter(), 0
    for number in range(10_000_000):
        total += number
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
