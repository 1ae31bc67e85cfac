"""The model and all that is trained, as the latest checkpoint left it."""

from __future__ import annotations

from pathlib import Path

import torch

from compiler.plan import Plan
from runtime import checkpoints, sharded_saving, zero_saving
from runtime.build import Built, build, load_state, without_starts
from runtime.checkpoints import Snapshot
from runtime.context import LOG, Context, is_sharded
from runtime.ema import Ema
from runtime.errors import RunFailed
from runtime.fused_backward import FusedBackward
from runtime.loop import Side, Trained
from runtime.memory.gauge import NO_GAUGE
from runtime.optimizers import grouped, make_optimizer, own_arguments
from runtime.optimizers import load_state as load_optimizer
from runtime.quiet import native_output
from runtime.resident import loaded
from runtime.scaler import scaler_for
from runtime.sharded import Shards, sharded
from runtime.speed import prepare
from runtime.together import Together
from runtime.zero import Zero, zeroed


def model_of(context: Context) -> tuple[Built, Together | None]:
    """The model as it is loaded, with its adapter; of ranks that share it each has its part."""
    plan = context.plan
    built = _built(context)
    if not is_sharded(context):
        return built, None
    given = (built, plan, context.family, context.device, context.ranks)
    zero = plan.sharing.strategy == "deepspeed"
    with native_output(context.folder / LOG):  # DeepSpeed tries a compiler, which complains
        return zeroed(*given) if zero else sharded(*given)


def prepared(context: Context, built: Built, shards: Together | None) -> tuple[Trained, int]:
    """All that is trained, of what `model_of` gave, as the latest checkpoint left it; and the
    updates done."""
    plan = context.plan
    if isinstance(shards, Zero):
        optimizer = shards.optimizer
    else:
        named = grouped(built.trainable.items(), plan)
        optimizer = make_optimizer(plan.optimizer, named, context.device)
    fused = plan.memory.layout.fused_backward
    trained = Trained(
        family=context.family,
        model=built.model,
        parameters=built.trainable,
        optimizer=optimizer,
        ema=Ema(plan.ema, built.trainable.items()) if plan.ema else None,
        fused=FusedBackward(built.model, built.trainable, optimizer, built.copies())
        if fused
        else None,
        shards=shards,
        scaler=scaler_for(plan.precision, context.device),
        method=built.method,
        rival=_rival(plan, built, context.device),
        text=built.text,
        nested=built.nested,
    )
    return trained, _resume(context, built, trained)


def _rival(plan: Plan, built: Built, device: torch.device) -> Side | None:
    """The discriminator of a distillation, with an optimizer of its own."""
    if plan.sprint is None or built.rival is None:
        return None
    facts = plan.sprint.discriminator
    return Side(
        parameters=built.rival.trainable,
        optimizer=make_optimizer(facts, built.rival.trainable.items(), device),
        buffers=built.rival.buffers,
        lr=facts.lr,
        name="discriminator_",
    )


def _built(context: Context) -> Built:
    """The model; what will be dealt out over the ranks waits in host memory."""
    plan, apart = context.plan, is_sharded(context)
    if checkpoints.latest(context.folder / "checkpoints") is not None:
        plan = without_starts(plan)
    prepare(plan)
    gauge = NO_GAUGE if apart else context.clock.gauge
    try:
        with gauge.reading("load") as piece:
            built = build(
                plan.model,
                plan.adapter,
                plan.precision,
                plan.memory.layout,
                context.family,
                torch.device("cpu") if apart else context.device,
                empty=False,
                seed=plan.seed,
                sharded=apart,
                speed=plan.speed,
                sprint=plan.sprint,
                text_training=plan.text_training,
                embeddings=plan.embeddings,
            )
            piece.name(loaded(plan, built))
            return built
    except ValueError as error:
        raise RunFailed(f"the model can't be built as planned: {error}") from error


def _resume(context: Context, built: Built, trained: Trained) -> int:
    saved = checkpoints.latest(context.folder / "checkpoints")
    if saved is None:
        return 0
    zero_saving.judge(saved, context.plan)
    with own_arguments(trained.optimizer, context.plan.optimizer):
        step = load(saved, built, trained, checked=True)  # rank 0 has, before all else
    context.events.message(f"going on from step {step} of {context.plan.steps.total}")
    return step


def load(saved: Path, built: Built, trained: Trained, *, checked: bool = False) -> int:
    """Everything that is trained as it was after the step that is returned. Raises RunFailed if the
    checkpoint is damaged, see `runtime.checkpoints.load`."""
    if trained.shards is not None:
        given = (trained.optimizer, trained.ema)
        if isinstance(trained.shards, Zero):
            return zero_saving.restore(saved, trained.shards, *given)
        assert isinstance(trained.shards, Shards)
        return sharded_saving.restore(saved, trained.shards, *given)
    snapshot = checkpoints.load(saved, checked=checked)
    load_state(built, snapshot.weights)
    # What an optimizer has by now goes first: there is room for one state, not for two.
    for side in (trained.optimizer, trained.rival.optimizer if trained.rival else None):
        if side is not None:
            side.state.clear()
    load_optimizer(trained.optimizer, dict(snapshot.optimizer))
    if trained.ema is not None and snapshot.ema is not None:
        trained.ema.load_state(snapshot.ema)
    if trained.scaler is not None and snapshot.scaler is not None:
        trained.scaler.load_state(snapshot.scaler)
    if trained.rival is not None:
        _load_rival(trained.rival, snapshot)
    return snapshot.step


@torch.no_grad()
def _load_rival(rival: Side, snapshot: Snapshot) -> None:
    """Raises KeyError where the checkpoint is of a run without one, which resuming refuses."""
    saved, optimizer = snapshot.rival or {}, snapshot.rival_optimizer or {}
    for name, tensor in rival.state.items():
        tensor.copy_(saved[name])
    load_optimizer(rival.optimizer, dict(optimizer))
