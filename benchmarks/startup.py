"""How long a first answer takes, as a ratio to `python -c "import typer, rich"`.

CPU seconds (user and system) of whole processes, the least of several interleaved runs: on a busy
machine the least is what the program itself needs.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 12
QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
BROKEN = 'name = "x"\nschema = 1\n[model]\nfamily = "flux"\n[adapter]\nrnk = 16\n'


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "broken.toml"
        recipe.write_text(BROKEN)
        base = [sys.executable, "-c", "import typer, rich"]
        commands = {
            "import typer, rich": base,
            "tuner --help": [sys.executable, "-m", "tuner", "--help"],
            "tuner plan broken.toml": [sys.executable, "-m", "tuner", "plan", str(recipe)],
            "tuner plan, repeated": [sys.executable, "-m", "tuner", "plan", str(QUICKSTART)],
        }
        best = {name: (float("inf"), float("inf")) for name in commands}
        _seconds(commands["tuner plan, repeated"])  # simulates its step, if nobody has before
        for _ in range(RUNS):
            for name, command in commands.items():
                best[name] = tuple(map(min, best[name], _seconds(command)))
    unit = best["import typer, rich"][0]
    for name, (cpu, wall) in best.items():
        print(f"{name:<24}{cpu:6.3f} s CPU {wall:6.3f} s wall   ratio {cpu / unit:5.2f}")


def _seconds(command: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of one process."""
    before, began = os.times(), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after, ended = os.times(), time.perf_counter()
    cpu = sum(after[2:4]) - sum(before[2:4])
    return cpu, ended - began


if __name__ == "__main__":
    main()
