"""Optimizer, schedule, objective and averages."""

from __future__ import annotations

from compiler import plan
from compiler.draft import Draft
from compiler.passes.fused import refuse_fused_backward
from compiler.passes.objective import resolve_objective
from compiler.passes.optimizer import averages, optimizer_name, resolve_optimizer
from compiler.spans import KeyPath
from compiler.units import Interval

CLIP: KeyPath = ("train", "max_grad_norm")
SPRINT_CLIP = 0.1


def resolve_training(draft: Draft) -> None:
    """Fill in `optimizer`, `schedule`, `objective` and `ema`."""
    name = optimizer_name(draft)
    draft.optimizer = resolve_optimizer(draft, name) if name else None
    refuse_fused_backward(draft)
    draft.objective = resolve_objective(draft)
    if draft.steps is not None:
        draft.schedule = _schedule(draft, draft.steps.total)
        draft.ema = _ema(draft, draft.steps)
    sprints = draft.recipe.sprint is not None
    why = "the reference script's own for distillation" if sprints else ""
    by = "decided" if sprints else "default"
    draft.decide(CLIP, max_grad_norm(draft), by=by, why=why)


def max_grad_norm(draft: Draft) -> float:
    """What gradients are scaled down to. Distillation has a default of its own."""
    if draft.recipe.sprint is not None and not draft.given(CLIP):
        return SPRINT_CLIP
    return float(draft.recipe.train.max_grad_norm)


def _schedule(draft: Draft, total: int) -> plan.Schedule:
    recipe = draft.recipe.train.schedule
    warmup = recipe.warmup.of(total)
    _judge_length(draft, warmup, total)
    draft.decide(("train", "schedule", "name"), recipe.name)
    draft.decide(("train", "schedule", "warmup"), f"{warmup} steps")
    for key, owner in (("power", "polynomial"), ("cycles", "cosine-with-restarts")):
        where = ("train", "schedule", key)
        if draft.given(where) and recipe.name != owner:
            draft.error("no-effect", where, f"`{key}` belongs to the {owner} schedule", of="key")
    _judge_shape(draft)
    return plan.Schedule(
        name=recipe.name,
        warmup=warmup,
        length=total,
        end=recipe.end,
        power=recipe.power,
        cycles=recipe.cycles,
    )


def _judge_length(draft: Draft, warmup: int, total: int) -> None:
    """Warm-up and restarts must have room in the run."""
    recipe, where = draft.recipe.train.schedule, ("train", "schedule", "warmup")
    if warmup > total:
        draft.error(
            "schedule-too-long",
            where,
            f"a warm-up of {warmup} steps in a run of {total}",
            help='say a share, such as warmup = "10%"',
        )
    elif warmup == total:
        draft.warn(
            "long-warmup",
            where,
            f"the warm-up takes the whole run of {total} steps: only the last is trained at `lr`",
            help='say a share, such as warmup = "10%"',
        )
    elif recipe.name == "cosine-with-restarts" and recipe.cycles > total - warmup:
        draft.error(
            "schedule-too-long",
            ("train", "schedule", "cycles"),
            f"{recipe.cycles} cycles in the {total - warmup} steps after the warm-up",
            label="at most one a step",
        )


def _judge_shape(draft: Draft) -> None:
    """A fall that is none, and one under an optimizer that needs none."""
    recipe = draft.recipe.train.schedule
    if draft.given(("train", "schedule", "end")) and recipe.name == "constant":
        draft.error(
            "no-effect",
            ("train", "schedule", "end"),
            "a constant schedule ends where it begins: `end` has no effect",
            of="key",
        )
    if recipe.name != "constant" and averages(draft):
        draft.error(
            "conflict",
            ("train", "schedule", "name"),
            f"`{draft.recipe.train.optimizer.name}` is schedule-free: it averages its weights "
            f"instead of lowering the learning rate, so {recipe.name} would weaken it twice",
            help='schedule = { name = "constant", warmup = "5%" }',
        )


def _ema(draft: Draft, steps: plan.Steps) -> plan.Ema | None:
    recipe = draft.recipe.train.ema
    if recipe is None:
        return None
    if averages(draft):
        draft.error(
            "conflict",
            ("train", "ema"),
            f"`{draft.recipe.train.optimizer.name}` averages the weights itself: an average of "
            "what it trains is not what it keeps",
            help="leave [train.ema] out",
            of="key",
        )
    every = in_steps(draft, ("train", "ema", "every"), recipe.every, steps)
    draft.decide(("train", "ema", "decay"), recipe.decay)
    draft.decide(("train", "ema", "every"), f"{every} steps")
    return plan.Ema(
        decay=recipe.decay,
        device=recipe.device,
        every=max(every, 1),
        warmup=recipe.warmup,
        save=recipe.save,
    )


def in_steps(draft: Draft, path: KeyPath, interval: Interval, steps: plan.Steps) -> int:
    """An interval in steps; 0 for `off`. A time has no fixed number of steps and is refused."""
    if interval.is_off:
        return 0
    if interval.steps is not None:
        return interval.steps
    if interval.epochs is not None:
        return max(1, round(interval.epochs * steps.per_epoch))
    draft.error(
        "bad-unit",
        path,
        f"`{interval}` is a time; this interval is counted in steps, so that a run repeats exactly",
        help='say it in steps or epochs, such as "400 steps" or "1 epoch"',
    )
    return 0
