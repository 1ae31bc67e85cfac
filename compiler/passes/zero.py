"""Strategy "deepspeed": what of ZeRO a recipe asks for, and what does not go with it."""

from __future__ import annotations

from compiler import plan
from compiler.adapters import PLAIN
from compiler.draft import Draft
from compiler.machine import DEEPSPEED
from compiler.optimizers import OPTIMIZERS
from compiler.spans import KeyPath

STRATEGY: KeyPath = ("launch", "strategy")
STAGE: KeyPath = ("launch", "deepspeed", "stage")
OFFLOAD: KeyPath = ("launch", "deepspeed", "offload_optimizer")
USUAL_STAGE = 2  # weights stay whole, so that nothing is gathered while the model computes


def zero_sharing(draft: Draft) -> plan.Sharing:
    """What the recipe asks for; warns where the package is missing."""
    asked = draft.recipe.launch.deepspeed
    if DEEPSPEED in draft.machine.missing:
        draft.warn(
            "missing-package",
            STRATEGY,
            'strategy "deepspeed" needs the package deepspeed, which is not installed here',
            help='pip install "tuner[deepspeed]"',
        )
    if asked.offload_optimizer is True and draft.device == "cpu":
        draft.error(
            "no-effect",
            OFFLOAD,
            "`offload_optimizer` moves the optimizer's state to host memory; where the processor "
            "trains it is there anyway",
            of="key",
        )
    return plan.Sharing(
        strategy="deepspeed",
        stage=USUAL_STAGE if asked.stage == "auto" else asked.stage,
        offload_optimizer=asked.offload_optimizer is True,
    )


def not_by_zero(draft: Draft) -> tuple[str, KeyPath]:
    """Why DeepSpeed can't do what `shardable` lets pass, and the key that says so; "" if it can."""
    nothing: KeyPath = ()
    if draft.precision is not None and draft.precision.trained != "float32":
        why = f"DeepSpeed updates float32 weights, not {draft.precision.trained} ones"
        return why, ("precision", "trained")
    if draft.optimizer is not None and OPTIMIZERS[draft.optimizer.name].averages:
        why = f"`{draft.optimizer.name}` keeps other weights than it trains, and each device a part"
        return why, ("train", "optimizer", "name")
    if draft.recipe.train.ema is not None:
        why = "an average of float32 weights that lie in pieces on all devices is not kept here"
        return why, ("train", "ema")
    if draft.recipe.sprint is not None:
        return "a distillation trains two networks in turns", ("sprint",)
    kind = draft.adapter.kind if draft.adapter is not None else "lora"
    if draft.sharing.stage == 3 and kind not in PLAIN:
        why = f"stage 3 gathers weights layer by layer, and {kind} reads them from elsewhere"
        return why, ("adapter", "kind")
    return "", nothing


def decide_zero(draft: Draft) -> None:
    """Record stage and offload."""
    sharing = draft.sharing
    if sharing.strategy != "deepspeed":
        draft.decide(STAGE, "none", why="of `deepspeed` only")
        draft.decide(OFFLOAD, "none", why="of `deepspeed` only")
        return
    why = "gradients and states are shared out, and weights stay whole where they compute"
    draft.decide(STAGE, sharing.stage, by="decided", why=why)
    why = "updates on the device are faster"
    draft.decide(OFFLOAD, sharing.offload_optimizer, by="decided", why=why)


def refuse_zero_keys(draft: Draft) -> None:
    """Keys of `[launch.deepspeed]` under another strategy."""
    for path in (STAGE, OFFLOAD):
        if draft.given(path):
            draft.error(
                "no-effect",
                path,
                f'`{path[-1]}` is of strategy "deepspeed"',
                help='strategy = "deepspeed" in [launch]',
                of="key",
            )
