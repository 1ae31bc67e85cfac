"""Which checkpoints are kept besides the newest, and whether that means anything in this run."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm

from compiler.draft import Draft
from compiler.keeping import CLIP_SCORE, LOSS
from compiler.occasions import Occasions
from compiler.spans import KeyPath

KEEP_EVERY: KeyPath = ("checkpoints", "keep_every")
BEST: KeyPath = ("checkpoints", "best")
RESULT: KeyPath = ("checkpoints", "result")


def judge_keeping(draft: Draft) -> None:
    """Settings of `draft.checkpoints` that nothing comes of."""
    if draft.checkpoints is None or draft.steps is None or draft.manifest is None:
        return
    _multiples(draft)
    _best(draft)
    rules = draft.checkpoints
    if rules.result == "best" and not rules.best:
        draft.error(
            "no-effect",
            RESULT,
            "no metric says which checkpoint is the best",
            help=f'best = "{LOSS}"',
        )


def _multiples(draft: Draft) -> None:
    assert draft.checkpoints is not None and draft.steps is not None
    rules = draft.checkpoints
    if not rules.keep_every:
        return
    draft.decide(KEEP_EVERY, f"{rules.keep_every} steps")
    made = Occasions(rules.every, draft.steps.total)
    if not rules.keep:
        draft.error(
            "no-effect",
            KEEP_EVERY,
            "`keep_every` has no effect: `keep = 0` keeps all",
            help="keep = 3",
            of="key",
        )
    elif not rules.every or lcm(rules.every, rules.keep_every) > made[-1]:
        when = f"every {rules.every} steps" if rules.every else "only at the end"
        draft.error(
            "no-effect",
            KEEP_EVERY,
            f"no checkpoint of this run is at a multiple of {rules.keep_every} steps: they are "
            f"written {when}, and the run has {draft.steps.total} steps",
            help=f'keep_every = "{2 * rules.every} steps"' if rules.every else 'every = "1 epoch"',
        )


def _best(draft: Draft) -> None:
    assert draft.checkpoints is not None and draft.steps is not None
    rules, total = draft.checkpoints, draft.steps.total
    if not rules.best:
        return
    known = dict(_measured(draft))
    if rules.best not in known:
        _unknown(draft, rules.best, known)
        return
    every = known[rules.best]
    if not (rules.every and every) or lcm(rules.every, every) >= total:
        draft.error(
            "no-effect",
            BEST,
            f"no checkpoint but the last has a `{rules.best}` to be judged by",
            label=f"measured {_spelt(every)}; checkpoints are written {_spelt(rules.every)}",
            help="write checkpoints at steps at which it is measured",
        )
        return
    draft.decide(BEST, rules.best)


def _spelt(every: int) -> str:
    return f"every {every} steps" if every else "only at the end"


def _unknown(draft: Draft, asked: str, known: dict[str, int]) -> None:
    wanted = (LOSS, CLIP_SCORE)
    if asked in wanted or asked.startswith(f"{LOSS}/"):
        lacking = "holdout = 0.05 in [[data.source]]"
        if asked != CLIP_SCORE and draft.recipe.evaluation.every.is_off:
            lacking = 'every = "1 epoch" in [evaluation]'
        if asked == CLIP_SCORE:
            lacking = "clip_score = true in [validation], with prompts"
        several = asked.startswith(f"{LOSS}/") and LOSS in known
        draft.error(
            "no-effect",
            BEST,
            f"`{asked}` is not measured in this run",
            help=f"measured: {', '.join(known)}" if several else lacking,
        )
        return
    draft.error(
        "unknown-value",
        BEST,
        f"unknown metric `{asked}`",
        help=f"known: {', '.join(known or wanted)}",
    )


def _measured(draft: Draft) -> Iterator[tuple[str, int]]:
    """Metrics that judge this run, and every how many steps (0: only at the end)."""
    if draft.validation is not None and draft.validation.clip_model:
        yield CLIP_SCORE, draft.validation.every
    if draft.evaluation is not None:
        yield LOSS, draft.evaluation.every
        sources = {group.source for group in draft.evaluation.groups}
        if len(sources) > 1:
            for source in sorted(sources):
                yield f"{LOSS}/{source}", draft.evaluation.every
