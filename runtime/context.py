"""What all phases of a run need, and what they ask of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from attrs import frozen

from compiler.adapters import result_name
from compiler.data.manifest import Manifest
from compiler.plan import Plan
from runtime import checkpoints
from runtime.clock import Clock
from runtime.data.cache import Cache
from runtime.events import Events
from runtime.families.base import Family
from runtime.loop import Trained
from runtime.optimizers import kept_weights
from runtime.publish.publisher import Publisher
from runtime.ranks import Ranks
from runtime.stop import Stop

LOG = "run.log"


@frozen(kw_only=True)
class Context:
    """What all phases need."""

    plan: Plan
    manifest: Manifest
    family: Family
    cache: Cache
    device: torch.device
    folder: Path
    events: Events
    stop: Stop
    clock: Clock
    ranks: Ranks
    publisher: Publisher


def saved_step(run_folder: Path) -> int:
    """Updates done in the latest checkpoint; 0 without one."""
    saved = checkpoints.latest(run_folder / "checkpoints")
    return int(checkpoints.read_state(saved)["step"]) if saved else 0


def result_folder(plan: Plan) -> Path:
    """Where the trained weights end up: `lora` or `model` in the run folder."""
    return Path(plan.run_folder) / result_name(plan.adapter)


def is_sharded(context: Context) -> bool:
    """Whether each rank holds a part of the model."""
    return context.plan.sharing.strategy != "ddp" and context.ranks.count > 1


def as_leader(context: Context, trained: Trained, task: Callable[[], None]) -> None:
    """Rank 0 does `task`, which may call the model; the others wait until it is done."""
    if trained.shards is None:
        context.ranks.led(task)
    else:
        trained.shards.led(task, trained.ema, kept(trained))


def as_leader_at_end(context: Context, trained: Trained, task: Callable[[], None]) -> None:
    """As `as_leader`, when ranks that hold the whole model have nothing to wait for."""
    if trained.shards is None:
        task()
    else:
        as_leader(context, trained, task)


def announce(context: Context, done: int) -> None:
    """Tell that training goes on, `done` updates in."""
    context.events.phase("train", context.plan.steps.total, "steps")
    context.events.advance(done)


def kept(trained: Trained) -> AbstractContextManager[None]:
    """Inside, the weights are those to be judged and kept."""
    return kept_weights(trained.optimizer, trained.parameters.values())
