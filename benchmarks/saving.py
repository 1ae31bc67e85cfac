"""How long a step waits for a checkpoint: written there and then, or in the background.

    python benchmarks/saving.py [MIB] [DEVICE]

A state of MIB (default 512): float32 weights and two moments of AdamW, on DEVICE ("cpu" by default,
or "cuda"). Each way saves four times below a temporary folder (TMPDIR), a second of other work
after each; the first save, which also makes the room for the copy, is shown apart.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from compiler.plan import Checkpoints
from runtime import checkpoints
from runtime.checkpoints import Snapshot
from runtime.host_copy import HostCopy
from runtime.optimizers import to_host
from runtime.saving import Saver

MIB = 2**20
TIMES = 4
RULES = Checkpoints(every=1, keep=1)


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    device = torch.device(sys.argv[2] if len(sys.argv) > 2 else "cpu")
    state = made(size, device)
    ways: Mapping[str, Callable[[Path], list[float]]] = {
        "at once": lambda root: at_once(state, root),
        "in the background": lambda root: behind(state, root, device),
    }
    found = {}
    print(f"{size} MiB on {device}: seconds that a step waits")
    for name, way in ways.items():
        with tempfile.TemporaryDirectory() as root:
            first, *rest = way(Path(root))
        found[name] = median(rest)
        print(f"{name:<20}first {first:7.3f}   then {found[name]:7.3f}")
    print(f"ratio {found['at once'] / found['in the background']:.1f}")


def made(size: int, device: torch.device) -> dict[str, Any]:
    """Weights by name, and an optimizer's state as its `state_dict` gives it."""
    count = size * MIB // (3 * 4) // (1 << 20) or 1  # tensors of 2^20 numbers, each three times
    weights = {f"blocks.{n}.weight": torch.randn(1024, 1024, device=device) for n in range(count)}
    moments = {
        n: {"step": torch.tensor(1.0), "exp_avg": weight * 0.1, "exp_avg_sq": weight**2}
        for n, weight in enumerate(weights.values())
    }
    return {"weights": weights, "optimizer": {"state": moments, "param_groups": []}}


def taken(step: int, copied: Mapping[str, Any]) -> Snapshot:
    """A checkpoint of `copied`."""
    return Snapshot(step=step, epoch=1, plan="benchmark", ema=None, versions={}, **copied)


def at_once(state: Mapping[str, Any], root: Path) -> list[float]:
    """Seconds of each save that training waits for."""
    found = []
    for step in range(1, TIMES + 1):
        begun = time.perf_counter()
        checkpoints.save(root, taken(step, to_host(dict(state))))
        found.append(time.perf_counter() - begun)
        work()
    return found


def behind(state: Mapping[str, Any], root: Path, device: torch.device) -> list[float]:
    """Seconds of each copy; writing goes on during the work between two of them."""
    room, saver, found = HostCopy(device), Saver(root, RULES, root / "metrics.jsonl"), []
    for step in range(1, TIMES + 1):
        saver.finish()  # a run that saves more often than the disk can write would wait here
        begun = time.perf_counter()
        saver.save(step, lambda step=step: taken(step, room.take(dict(state))))  # type: ignore[misc]
        found.append(time.perf_counter() - begun)
        work()
    saver.finish()
    room.close()
    return found


def work() -> None:
    """A second without a save."""
    time.sleep(1.0)


if __name__ == "__main__":
    main()
