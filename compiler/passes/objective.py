"""What the loss compares: noise levels, their shift and range, the loss and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import evolve

from compiler import plan
from compiler.draft import Draft
from compiler.families.card import FamilyCard
from compiler.noise import (
    entries_of,
    knows_zero_snr,
    level,
    noise_table,
    predicted,
    shift_of,
    trained_entries,
)
from compiler.schema.ranges import LEAST_SHIFT, MOST_SHIFT
from compiler.spans import KeyPath

WHERE: KeyPath = ("train", "timesteps")
TOLD = 1.0
"""Guidance that a model distilled from it is told in training, by default: none beyond the picture
itself. A model so trained is still guided at inference."""
MOST_STATED = 1e6  # of the numbers of a scheduler's rule for shifts
OWNERS = {
    "mean": "logit-normal",
    "std": "logit-normal",
    "mode_scale": "mode",
    "alpha": "beta",
    "beta": "beta",
}
"""Which sampling a key belongs to."""


def resolve_objective(draft: Draft) -> plan.Objective | None:
    """The objective; None without a model."""
    if draft.model is None:
        return None
    family, recipe, loss = draft.model.family, draft.recipe.train.timesteps, draft.recipe.train.loss
    sampling = family.sampling if recipe.sampling == "auto" else recipe.sampling
    draft.decide((*WHERE, "sampling"), sampling, by=f"family {family.name}")
    scheduler = draft.model.configs["scheduler"]
    prediction = predicted(family, scheduler)
    shift, rule = _shift(draft) if prediction == "flow" else _unshifted(draft)
    _unused_timestep_keys(draft, sampling)
    highest = family.made_for if recipe.max == "auto" else float(recipe.max)
    draft.decide((*WHERE, "max"), highest, by=f"family {family.name}", why=_made_for(family))
    table = _table(draft, prediction)
    guidance = _guidance(draft)
    if not _judge_loss(draft, prediction):
        return None
    if recipe.stratified and draft.steps is not None and _alone(draft):
        draft.warn(
            "no-effect",
            (*WHERE, "stratified"),
            "each step has one sample: there is nothing to share the noise levels out among",
            help="a larger batch_size or accumulate in [train]",
        )
    made = plan.Objective(
        prediction=prediction,
        table=table,
        sampling=sampling,  # type: ignore[arg-type]  # cards name only what the plan knows
        logit_mean=recipe.mean,
        logit_std=recipe.std,
        mode_scale=recipe.mode_scale,
        alpha=float(recipe.alpha),
        beta=float(recipe.beta),
        shift=shift,
        shift_by_size=rule,
        min_sigma=float(recipe.min),
        max_sigma=highest,
        stratified=recipe.stratified,
        loss=loss.kind,
        delta=float(loss.delta),
        delta_schedule=loss.schedule,
        weighting=loss.weighting,
        gamma=float(loss.gamma),
        offset_noise=float(draft.recipe.train.noise.offset),
        guidance=guidance,
    )
    return made if _has_levels(draft, made) else None


def _alone(draft: Draft) -> bool:
    assert draft.steps is not None
    largest = max((bucket.batch_size for bucket in draft.buckets), default=1)
    return largest * draft.steps.accumulate * draft.steps.ranks == 1


def _made_for(family: FamilyCard) -> str:
    if family.made_for == 1.0:
        return "pure noise"
    return "an expert for little noise: what it was made for"


def _guidance(draft: Draft) -> float | None:
    """What a model distilled from guidance is told of it in training; None: it is told nothing."""
    assert draft.model is not None
    family, where, asked = draft.model.family, ("train", "guidance"), draft.recipe.train.guidance
    if family.told_guidance(draft.model.configs[family.trained_component]):
        value = TOLD if asked == "auto" else float(asked)
        draft.decide(where, value, by="decided", why="pictures are learned as they are")
        return value
    draft.decide(where, "not used", by=f"family {family.name}", why="this base is told none")
    if asked != "auto":
        draft.error(
            "not-in-family",
            where,
            f"this {family.title} is told no guidance scale: it was not distilled from guidance",
            help="leave `guidance` out; of pictures drawn, it is said in `[validation]`",
            of="key",
        )
    return None


def _unshifted(draft: Draft) -> tuple[float, None]:
    """A table of noise levels has no shift."""
    assert draft.model is not None
    where, asked = (*WHERE, "shift"), draft.recipe.train.timesteps.shift
    draft.decide(where, 1.0, by=f"family {draft.model.family.name}", why="its noise has a table")
    if asked not in ("auto", 1.0):
        draft.error(
            "not-in-family",
            where,
            f"{draft.model.family.title} has a table of noise levels, which no shift moves",
            help='leave `shift` out; more noise: `sampling = "logit-normal"` with `mean = -0.5`',
        )
    return 1.0, None


def _table(draft: Draft, prediction: str) -> plan.NoiseTable | None:
    """The noise levels' table, and what is said of the noise where there is one."""
    assert draft.model is not None
    recipe, where = draft.recipe.train.noise, ("train", "noise")
    title = draft.model.family.title
    draft.decide((*where, "offset"), recipe.offset)
    table = noise_table(draft.model.family, draft.model.configs["scheduler"])
    if table is None:
        for key, given in (("offset", recipe.offset > 0), ("zero_terminal_snr", True)):
            if given and draft.given((*where, key)):
                draft.error(
                    "not-in-family",
                    (*where, key),
                    f"{title} matches a flow: its last noise level is pure noise already",
                    help=f"leave `{key}` out",
                    of="key",
                )
        by = f"family {draft.model.family.name}"
        draft.decide(
            (*where, "zero_terminal_snr"), False, by=by, why="its last level is pure noise"
        )
        return None
    asked = recipe.zero_terminal_snr
    zero = table.zero_terminal_snr if asked == "auto" else asked
    by = "the base's scheduler" if asked == "auto" else "recipe"
    draft.decide((*where, "zero_terminal_snr"), zero, by=by)
    if zero and prediction == "epsilon":
        draft.error(
            "conflict",
            (*where, "zero_terminal_snr"),
            "in pure noise nothing of the picture is left, and a model that predicts the noise "
            "learns nothing there",
            help="leave `zero_terminal_snr` out, or train a base that predicts v",
        )
    elif zero != table.zero_terminal_snr:
        _judge_sampling(draft, zero)
    return evolve(table, zero_terminal_snr=zero)


def _judge_sampling(draft: Draft, zero: bool) -> None:
    """Warn where pictures are drawn on other noise levels than are trained. A whole model brings a
    scheduler of its own, which says them."""
    assert draft.model is not None
    scheduler = draft.model.configs["scheduler"]
    kind, able = scheduler.get("_class_name", "scheduler"), knows_zero_snr(scheduler)
    if draft.recipe.adapter is None and able:
        return
    taken = kind if able else "DDIMScheduler"
    spacing = ', timestep_spacing="trailing"' if zero else ""
    stated = f"rescale_betas_zero_snr={zero}{spacing}"
    draft.warn(
        "shift-differs",
        ("train", "noise", "zero_terminal_snr"),
        f"trained with zero_terminal_snr = {str(zero).lower()}, but the base's scheduler "
        "samples otherwise",
        help=f"draw with `{taken}.from_config(pipeline.scheduler.config, {stated})`",
    )


def _shift(draft: Draft) -> tuple[float, plan.ShiftRule | None]:
    """The shift, or 0 and the rule that it follows from each picture's size by."""
    assert draft.model is not None
    recipe, where = draft.recipe.train.timesteps, (*WHERE, "shift")
    family, scheduler = draft.model.family, draft.model.configs.get("scheduler", {})
    found, key = family.shift(scheduler)
    rule = _rule(draft, scheduler)
    by_size = rule is not None and bool(scheduler.get("use_dynamic_shifting"))
    asked = ("resolution" if by_size else found) if recipe.shift == "auto" else recipe.shift
    key = "use_dynamic_shifting" if by_size else key
    draft.decide(
        where,
        asked,
        by="the base's scheduler" if key else f"family {family.name}",
        why=f"its configuration says {key}" if key else "its scheduler states none",
    )
    if asked == "resolution" and rule is None:
        draft.error(
            "not-in-family",
            where,
            f"{family.title} has no shift by resolution: its pipeline samples all sizes alike, at "
            f"{found:g}",
            help=f"shift = {found:g}",
        )
        return found, None
    if (asked == "resolution") != by_size or (not by_size and asked != found):
        ours = "by resolution" if asked == "resolution" else f"at shift {asked:g}"
        theirs = "by resolution" if by_size else f"at {found:g}"
        text = f"trained {ours}, but the base's scheduler samples {theirs}"
        draft.warn("shift-differs", where, text)
    return (0.0, rule) if asked == "resolution" else (float(asked), None)


def _rule(draft: Draft, scheduler: Mapping[str, Any]) -> plan.ShiftRule | None:
    """The family's rule, with what the base's own scheduler says of it."""
    assert draft.model is not None
    family = draft.model.family
    facts = family.token_shift
    if facts is None:
        return None
    transformer = draft.model.configs[family.trained_component]

    def stated(key: str, otherwise: float) -> float:
        value = scheduler.get(key) if facts.stated else None
        if isinstance(value, int | float) and abs(value) < MOST_STATED:
            return value
        return otherwise

    base = int(stated("base_image_seq_len", facts.base_tokens))
    return plan.ShiftRule(
        patch=family.patch(transformer),
        base_tokens=base,
        max_tokens=max(int(stated("max_image_seq_len", facts.max_tokens)), base + 1),
        base_shift=float(stated("base_shift", facts.base_shift)),
        max_shift=float(stated("max_shift", facts.max_shift)),
        kind="linear" if scheduler.get("time_shift_type") == "linear" else "exponential",
        far=plan.FarShift(tokens=facts.far[0], slope=facts.far[1], start=facts.far[2])
        if facts.far is not None
        else None,
    )


def _unused_timestep_keys(draft: Draft, sampling: str) -> None:
    for key, needs in OWNERS.items():
        where = (*WHERE, key)
        if draft.given(where) and sampling != needs:
            draft.error(
                "no-effect",
                where,
                f"`{key}` belongs to `{needs}` sampling; this recipe samples `{sampling}`",
                of="key",
            )


def _has_levels(draft: Draft, objective: plan.Objective) -> bool:
    """Whether each bucket has noise levels between `min` and `max`."""
    key = "max" if draft.given((*WHERE, "max")) else "min"
    if objective.min_sigma >= objective.max_sigma:
        draft.error(
            "out-of-range",
            (*WHERE, key),
            f"no noise level is above {objective.min_sigma:g} and below {objective.max_sigma:g}",
            help="min = 0.2, max = 0.8",
        )
        return False
    count = entries_of(objective)
    for height, width in _sizes(draft):
        shift = shift_of(objective, height, width)
        if objective.table is None and not LEAST_SHIFT <= shift <= MOST_SHIFT:
            draft.error(
                "out-of-range",
                (*WHERE, "shift"),
                f"a shift of {shift:g} leaves no noise levels apart; {LEAST_SHIFT:g} to "
                f"{MOST_SHIFT:,} can be trained",
                help="shift = 3.0",
            )
            return False
        if trained_entries(objective, shift) is None:
            least = level(count - 1, shift, count)
            draft.error(
                "out-of-range",
                (*WHERE, key),
                f"none of the {count} noise levels, {least:.2g} to 1 at shift {shift:.3g}, is "
                f"between {objective.min_sigma:g} and {objective.max_sigma:g}",
            )
            return False
    return True


def _sizes(draft: Draft) -> list[tuple[int, int]]:
    """Height and width of the latents of all buckets."""
    assert draft.model is not None
    factor = draft.model.family.vae_factor(draft.model.configs["vae"])
    return sorted({(b.height // factor, b.width // factor) for b in draft.buckets})


FLOW_WEIGHTS = ("diffusers-compat", "sigma-sqrt", "cosmap")
SNR_WEIGHTS = ("min-snr", "soft-min-snr")


def _judge_loss(draft: Draft, prediction: str) -> bool:
    """Record the loss, and refuse what it doesn't have; False where there is none to go on with."""
    recipe, where = draft.recipe.train.loss, ("train", "loss")
    draft.decide((*where, "weighting"), recipe.weighting)
    for key in ("delta", "schedule"):
        if draft.given((*where, key)) and recipe.kind == "mse":
            draft.error(
                "no-effect",
                (*where, key),
                f"`{key}` has no effect: the squared error has none",
                help='kind = "huber"',
                of="key",
            )
    if recipe.schedule != "constant" and recipe.delta > 1:
        draft.error(
            "out-of-range",
            (*where, "delta"),
            f"a delta of {recipe.delta:g} under a schedule that begins at 1 would grow with noise",
            label="must be at most 1",
            help='schedule = "constant"',
        )
    if draft.given((*where, "gamma")) and recipe.weighting not in SNR_WEIGHTS:
        draft.error(
            "no-effect",
            (*where, "gamma"),
            "`gamma` belongs to the weightings by SNR",
            help='weighting = "min-snr"',
            of="key",
        )
    if recipe.weighting in SNR_WEIGHTS and prediction == "flow":
        draft.error(
            "not-in-family",
            (*where, "weighting"),
            "min-SNR evens out how noise prediction weighs the noise levels; this base predicts a "
            "velocity, whose error weighs them evenly",
            help='weighting = "none"; less weight on little noise: "diffusers-compat"',
        )
        return False
    if recipe.weighting in FLOW_WEIGHTS and prediction != "flow":
        draft.error(
            "not-in-family",
            (*where, "weighting"),
            f'"{recipe.weighting}" weighs the levels of a flow; this base predicts '
            + ("the noise" if prediction == "epsilon" else "v"),
            help='weighting = "min-snr"',
        )
        return False
    return True
