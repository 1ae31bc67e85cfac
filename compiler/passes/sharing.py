"""How several devices share the work: each the whole model, or a share of every weight."""

from __future__ import annotations

from compiler import plan
from compiler.draft import Draft
from compiler.optimizers import OPTIMIZERS
from compiler.passes.zero import (
    STRATEGY,
    decide_zero,
    not_by_zero,
    refuse_zero_keys,
    zero_sharing,
)
from compiler.spans import KeyPath

RESHARD: KeyPath = ("launch", "reshard_after_forward")


def resolve_sharing(draft: Draft) -> None:
    """Fill in `draft.sharing`. What is left open is "ddp"; `choose_sharded` may change it."""
    launch = draft.recipe.launch
    if launch.devices in ("auto", 1):
        _refuse_for_one(draft)
        return
    if launch.strategy == "fsdp":
        draft.sharing = plan.Sharing(
            strategy="fsdp", reshard=launch.reshard_after_forward is not False
        )
        _refuse(draft, *shardable(draft))
    elif launch.strategy == "deepspeed":
        draft.sharing = zero_sharing(draft)
        reason, where = shardable(draft)
        _refuse(draft, *((reason, where) if reason else not_by_zero(draft)))
    if launch.strategy != "deepspeed":
        refuse_zero_keys(draft)
    if draft.given(RESHARD) and launch.strategy in ("ddp", "deepspeed"):
        draft.error(
            "no-effect",
            RESHARD,
            '`reshard_after_forward` is of strategy "fsdp"'
            + ('; under "ddp" nothing is gathered' if launch.strategy == "ddp" else ""),
            of="key",
        )


def _refuse(draft: Draft, reason: str, where: KeyPath) -> None:
    if reason:
        draft.error(
            "not-sharded",
            where if draft.given(where) else STRATEGY,
            f'"{draft.recipe.launch.strategy}" can\'t share this model out: {reason}',
            help='strategy = "ddp" in [launch]',
        )


def choose_sharded(draft: Draft) -> bool:
    """Turn to "fsdp" if the recipe leaves it open and nothing stands against it."""
    steps, launch = draft.steps, draft.recipe.launch
    several = steps is not None and steps.ranks > 1
    if not several or launch.strategy != "auto" or shardable(draft)[0]:
        return False
    draft.sharing = plan.Sharing(strategy="fsdp", reshard=launch.reshard_after_forward is not False)
    return True


def decide_sharing(draft: Draft, why: str) -> None:
    """Record what the strategy came to be; `why` holds where the recipe leaves it open."""
    several = draft.steps is not None and draft.steps.ranks > 1
    sharing = draft.sharing
    by = "decided" if several else "default"
    why = why if several else "one device has nothing to share"
    draft.decide(STRATEGY, sharing.strategy, by=by, why=why)
    decide_zero(draft)
    if sharing.strategy != "fsdp":
        _judge_reshard(draft)
        draft.decide(RESHARD, "none", why="nothing is gathered")
    else:
        why = "a block's weights are gathered twice, and only its own are there"
        draft.decide(RESHARD, sharing.reshard, by="decided", why=why)


def _judge_reshard(draft: Draft) -> None:
    """Warn of a key of "fsdp" where the recipe left the strategy open, and another was taken."""
    launch = draft.recipe.launch
    if launch.devices == 1 or launch.strategy != "auto" or launch.reshard_after_forward == "auto":
        return  # refused before, or as ever
    draft.warn(
        "no-effect",
        RESHARD,
        f'`reshard_after_forward` is of strategy "fsdp", and "auto" came to be '
        f'"{draft.sharing.strategy}"',
        help='leave it out, or strategy = "fsdp" in [launch]',
        of="key",
    )


def shardable(draft: Draft) -> tuple[str, KeyPath]:
    """Why the weights can't be dealt out, and the key that says so; "" if they can."""
    if draft.device not in ("cpu", "cuda"):
        return f"{draft.device} devices have no connections to gather over", ("launch", "device")
    if draft.optimizer is not None:
        row = OPTIMIZERS[draft.optimizer.name]
        if row.not_by_rows:
            return f"`{row.name}` can't: {row.not_by_rows}", ("train", "optimizer", "name")
    if draft.precision is not None and draft.precision.compute == "float16":
        why = "float16 gradients are scaled, and would overflow in sums over devices"
        return why, ("precision", "compute")
    if draft.speed.compile != "off":
        return "a compiled block can't wait for its weights to be gathered", ("speed", "compile")
    if draft.recipe.speed.compile == "regional":
        why = "blocks that are gathered are not compiled here"
        return why, ("speed", "compile")
    if draft.speed.fused_projections:
        why = "weights that are dealt out don't lie side by side, as fused projections do"
        return why, ("speed", "fused_projections")
    return _of_model(draft)


def _of_model(draft: Draft) -> tuple[str, KeyPath]:
    nothing: KeyPath = ()
    if draft.model is None:
        return "", nothing
    if draft.recipe.train.text_encoders is not None:
        why = "text encoders that are trained would stay whole on each device"
        return why, ("train", "text_encoders")
    if draft.recipe.embeddings is not None:
        why = "text encoders that learn new tokens would stay whole on each device"
        return why, ("embeddings",)
    trained = draft.model.family.trained_component
    kind = draft.quantize.get(trained, "none")
    if kind != "none":
        why = f"weights in {kind} are codes and scales, which would stay whole on each device"
        return why, ("model", trained, "quantize")
    offload = draft.recipe.memory.offload
    if not isinstance(offload, str) and offload.activations is True:
        why = "activations that wait on the host are not tested with gathered weights"
        return why, ("memory", "offload", "activations")
    if not isinstance(offload, str) and offload.blocks not in ("auto", 0):
        why = "a block that waits on the host can't be gathered from the devices"
        return why, ("memory", "offload", "blocks")
    for number, source in enumerate(draft.sources):
        if source.target == "base":
            why = (
                f"source `{source.id}` learns what the base predicts, which is one more pass, and "
                "all devices must gather equally often"
            )
            return why, ("data", "source", number, "regularisation", "target")
    return "", nothing


def _refuse_for_one(draft: Draft) -> None:
    """What says how to share where one device trains, as "auto" devices are one.

    "ddp" then passes where `devices` is left open: one device holds the whole model, too.
    """
    launch = draft.recipe.launch
    if launch.strategy != "deepspeed":  # else they go with it, and it is refused
        refuse_zero_keys(draft)
    refused = []
    if launch.strategy != "auto" and (launch.devices == 1 or launch.strategy != "ddp"):
        refused.append(STRATEGY)
    if launch.reshard_after_forward != "auto" and launch.devices == 1:
        refused.append(RESHARD)
    for path in refused:
        draft.error(
            "no-effect",
            path,
            f"`{path[-1]}` says how several devices share the work; this recipe trains on one",
            help=f"give `devices` in [launch] as 2 or more, or leave out `{path[-1]}`",
            of="key",
        )
