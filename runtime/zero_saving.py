"""Checkpoints of a run under DeepSpeed: each rank writes its part, complete or absent as a whole.

    checkpoints/step-000400/
        weights.safetensors     what is trained, whole and in float32, by parameter name
        zero/                   each rank's part of the float32 weights and of the optimizer's
                                state, in DeepSpeed's own files
        zero/ranks.json         who wrote them
        optimizer.pt            empty: its state lies in `zero`
        state.json              as in every checkpoint, see `runtime.checkpoints`

Only as many ranks under the same stage can go on from one; `tuner export --checkpoint` needs the
weights alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from compiler.plan import Plan, Sharing
from runtime.checkpoints import Snapshot, check_finite, read_state, reading
from runtime.ema import Ema
from runtime.errors import RunFailed
from runtime.ranks import Ranks
from runtime.sharded_saving import save_together
from runtime.zero import Zero

PARTS, WRITERS, TAG = "zero", "ranks.json", "state"


def save(
    checkpoints: Path,
    head: Snapshot,
    zero: Zero,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    ranks: Ranks,
) -> Path:
    """Write a checkpoint, all ranks together; returns its folder. `head` says what `state.json` is
    to hold. There is no average. Raises RunFailed if it can't be written; older checkpoints are
    untouched then."""

    def write(folder: Path) -> None:
        weights = zero.gathered({})
        check_finite(weights, head.step)
        zero.save(str(folder / PARTS), TAG)
        if ranks.leads:
            save_file(weights, folder / "weights.safetensors")
            torch.save({}, folder / "optimizer.pt")
            told = json.dumps(_writers(zero.sharing, ranks.count), indent=2)
            (folder / PARTS / WRITERS).write_text(told + "\n", encoding="utf-8")

    return save_together(checkpoints, head, ranks, write)


def restore(folder: Path, zero: Zero, optimizer: torch.optim.Optimizer, ema: Ema | None) -> int:
    """Set this rank's part to what a checkpoint holds; returns the updates done. See `judge`."""
    with reading(folder / PARTS, folder):
        found = zero.load(str(folder / PARTS), TAG)
    if not found:
        raise RunFailed(f"{folder / PARTS} lacks this rank's part of the checkpoint")
    return int(read_state(folder)["step"])


def judge(folder: Path, plan: Plan) -> None:
    """Raise RunFailed if the plan's ranks can't go on from a checkpoint: DeepSpeed's parts are for
    those that wrote them, and what others wrote has no such parts."""
    path = folder / PARTS / WRITERS
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    mine = None
    if plan.sharing.strategy == "deepspeed" and plan.steps.ranks > 1:
        mine = _writers(plan.sharing, plan.steps.ranks)
    if found != mine:
        raise RunFailed(
            f"{folder} was written {_words(found)}; this run goes on {_words(mine)}",
            help="begin another run, or go on as it was begun: what DeepSpeed has dealt out can't "
            "be dealt out otherwise. `tuner export --checkpoint` makes a result of it",
        )


def _writers(sharing: Sharing, ranks: int) -> dict[str, int | bool]:
    return {"stage": sharing.stage, "ranks": ranks, "offload": sharing.offload_optimizer}


def _words(writers: dict[str, int | bool] | None) -> str:
    if writers is None:
        return "without DeepSpeed"
    where = ", the optimizer on the host" if writers["offload"] else ""
    return f"by {writers['ranks']} devices under DeepSpeed's stage {writers['stage']}{where}"
