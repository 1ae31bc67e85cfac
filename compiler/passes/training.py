"""Optimizer, schedule, objective and averages."""

from __future__ import annotations

from typing import Any

from compiler import plan
from compiler.diagnostics import choices, nearest
from compiler.draft import Draft
from compiler.optimizers import OPTIMIZERS, OptimizerFacts
from compiler.spans import KeyPath
from compiler.units import Interval

ARGUMENTS = ("betas", "eps", "weight_decay", "momentum")  # keys of `[train.optimizer]` besides lr


def resolve_training(draft: Draft) -> None:
    """Fill in `optimizer`, `schedule`, `objective` and `ema`."""
    draft.optimizer = _optimizer(draft)
    draft.objective = _objective(draft)
    if draft.steps is not None:
        draft.schedule = _schedule(draft, draft.steps.total)
        draft.ema = _ema(draft, draft.steps)
    draft.decide(("train", "max_grad_norm"), draft.recipe.train.max_grad_norm)


def _optimizer(draft: Draft) -> plan.Optimizer | None:
    recipe = draft.recipe.train.optimizer
    row = OPTIMIZERS.get(recipe.name)
    if row is None:
        guess = nearest(recipe.name, OPTIMIZERS)
        draft.error(
            "unknown-value",
            ("train", "optimizer", "name"),
            f"unknown optimizer `{recipe.name}`",
            help=f"did you mean `{guess}`?" if guess else f"known: {choices(tuple(OPTIMIZERS))}",
        )
        return None
    arguments: dict[str, Any] = dict(row.defaults)
    for name in ARGUMENTS:
        value = getattr(recipe, name)
        where: KeyPath = ("train", "optimizer", name)
        if value is None:
            if name in arguments:
                draft.decide(where, arguments[name], by=f"optimizer {row.name}")
            continue
        if name not in row.arguments:
            draft.error(
                "no-effect",
                where,
                f"optimizer `{row.name}` takes no `{name}`",
                help=f"it takes {choices(tuple(row.arguments))}",
                of="key",
            )
            continue
        arguments[name] = list(value) if isinstance(value, tuple) else value
        draft.decide(where, value)
    _betas(draft, recipe.betas)
    draft.decide(("train", "optimizer", "name"), row.name)
    draft.decide(("train", "optimizer", "lr"), recipe.lr)
    return plan.Optimizer(
        name=row.name,
        lr=float(recipe.lr),
        arguments={k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()},
        fused=_fused(draft, row),
    )


def _fused(draft: Draft, row: OptimizerFacts) -> bool:
    """One kernel for the whole update where an accelerator has it. The processor's own rounds
    otherwise than the reference scripts and gains nothing there."""
    return draft.device in row.fused and draft.device != "cpu"


def _betas(draft: Draft, betas: tuple[float, float] | None) -> None:
    for number, beta in enumerate(betas or ()):
        if not 0 <= beta < 1:
            draft.error(
                "out-of-range",
                ("train", "optimizer", "betas", number),
                f"{beta:g} is out of range",
                label="must be at least 0 and below 1",
            )


def _objective(draft: Draft) -> plan.Objective | None:
    if draft.model is None:
        return None
    family, recipe = draft.model.family, draft.recipe.train.timesteps
    by = f"family {family.name}"
    sampling = family.sampling if recipe.sampling == "auto" else recipe.sampling
    draft.decide(("train", "timesteps", "sampling"), sampling, by=by)
    found, key = family.shift(draft.model.configs.get("scheduler", {}))
    shift = found if recipe.shift == "auto" else float(recipe.shift)
    draft.decide(
        ("train", "timesteps", "shift"),
        shift,
        by="the base's scheduler" if key else by,
        why=f"its configuration says {key}" if key else "its scheduler states none",
    )
    if recipe.shift != "auto" and shift != found:
        draft.warn(
            "shift-differs",
            ("train", "timesteps", "shift"),
            f"trained at shift {shift:g}, but the base's scheduler samples at {found:g}",
        )
    _unused_timestep_keys(draft, sampling)
    loss = draft.recipe.train.loss
    draft.decide(("train", "loss", "weighting"), loss.weighting)
    return plan.Objective(
        prediction=family.prediction,
        sampling=sampling,  # type: ignore[arg-type]  # cards name only what the plan knows
        logit_mean=recipe.mean,
        logit_std=recipe.std,
        mode_scale=recipe.mode_scale,
        shift=shift,
        loss=loss.kind,
        weighting=loss.weighting,
    )


def _unused_timestep_keys(draft: Draft, sampling: str) -> None:
    for key, needs in (("mean", "logit-normal"), ("std", "logit-normal"), ("mode_scale", "mode")):
        where = ("train", "timesteps", key)
        if draft.given(where) and sampling != needs:
            draft.error(
                "no-effect",
                where,
                f"`{key}` belongs to `{needs}` sampling; this recipe samples `{sampling}`",
                of="key",
            )


def _schedule(draft: Draft, total: int) -> plan.Schedule:
    recipe = draft.recipe.train.schedule
    warmup = recipe.warmup.of(total)
    if warmup > total:
        draft.error(
            "schedule-too-long",
            ("train", "schedule", "warmup"),
            f"a warm-up of {warmup} steps in a run of {total}",
            help='say a share, such as warmup = "10%"',
        )
    draft.decide(("train", "schedule", "name"), recipe.name)
    draft.decide(("train", "schedule", "warmup"), f"{warmup} steps")
    for key, owner in (("power", "polynomial"), ("cycles", "cosine")):
        where = ("train", "schedule", key)
        if draft.given(where) and recipe.name != owner:
            draft.error("no-effect", where, f"`{key}` belongs to the {owner} schedule", of="key")
    if draft.given(("train", "schedule", "end")) and recipe.name == "constant":
        draft.error(
            "no-effect",
            ("train", "schedule", "end"),
            "a constant schedule ends where it begins: `end` has no effect",
            of="key",
        )
    return plan.Schedule(
        name=recipe.name,
        warmup=warmup,
        length=total,
        end=recipe.end,
        power=recipe.power,
        cycles=recipe.cycles,
    )


def _ema(draft: Draft, steps: plan.Steps) -> plan.Ema | None:
    recipe = draft.recipe.train.ema
    if recipe is None:
        return None
    every = in_steps(draft, ("train", "ema", "every"), recipe.every, steps)
    draft.decide(("train", "ema", "decay"), recipe.decay)
    draft.decide(("train", "ema", "every"), f"{every} steps")
    return plan.Ema(decay=recipe.decay, device=recipe.device, every=max(every, 1))


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
