"""The pictures and the evaluation loss of a run, between its steps and at its end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve

from compiler.keeping import CLIP_SCORE
from runtime.context import Context, announce, kept
from runtime.data.fill import prompt_embeddings
from runtime.evaluate import Judge
from runtime.families.common import DTYPES
from runtime.families.sana_sprint import FAMILY as SPRINT
from runtime.families.sana_sprint import scheduler
from runtime.loop import Trained
from runtime.memory.gauge import NO_GAUGE
from runtime.met import judged
from runtime.resident import resident
from runtime.samplers import sampler
from runtime.scores.clip import ClipScore
from runtime.track import METRICS, Tracker, rows
from runtime.validate import Painter, is_done, measure, validate


def painter_of(context: Context, trained: Trained, trackers: Sequence[Tracker]) -> Painter | None:
    """What draws the plan's pictures; None where it has no prompts. The VAE waits on the host."""
    plan = context.plan
    family = context.family if plan.sprint is None else SPRINT
    if not (plan.validation.prompts and context.ranks.leads):
        return None
    if plan.validation.score:
        measure(plan.validation.score)  # a name that is not there should fail now
    clip = plan.validation.clip_model
    metrics = rows(context.folder / METRICS, plan.steps.total)
    host = torch.device("cpu")
    vae = next(c for c in plan.model.components if c.name == "vae")
    texts = [prompt.text for prompt in plan.validation.prompts]
    negative = prompt_embeddings(
        plan, family, context.cache, [plan.validation.negative], negative=True
    )
    return Painter(
        plan=plan,
        family=family,
        model=trained.model,
        vae=family.load(plan.model, "vae", DTYPES[vae.dtype], host),
        scheduler=sampler(plan.model, plan.validation.scheduler)
        if plan.sprint is None
        else scheduler(plan.sprint),
        positive=prompt_embeddings(plan, family, context.cache, texts),
        negative=negative[plan.validation.negative],
        ema=None if plan.validation.weights == "trained" else trained.ema,
        trackers=trackers,
        events=context.events,
        stop=context.stop,
        clip=ClipScore(clip).score if clip else None,
        told={int(row["step"]) for row in metrics if CLIP_SCORE in row} if clip else set(),
        text=trained.text,
        gauge=context.clock.gauge if trained.shards is None else NO_GAUGE,
        there=lambda: resident(plan, trained),
    )


def draw_samples(context: Context, trained: Trained, painter: Painter | None, step: int) -> None:
    """Draw the pictures of `step`, unless they are there."""
    if painter is None or is_done(painter, step):
        return
    with context.clock.phase("validate"), kept(trained):
        validate(painter, step)
    if step < context.plan.steps.total:
        announce(context, step)


def draw_result(context: Context, trained: Trained, painter: Painter | None, step: int) -> None:
    """Draw what is missing of the pictures of `step`, whose weights were taken up again. Trackers
    hear nothing of a step that they have passed."""
    if painter is not None:
        draw_samples(context, trained, evolve(painter, trackers=(), clip=None), step)


def judge_of(context: Context, done: int) -> Judge | None:
    """What measures the evaluation loss; None where nothing is held out to measure it on."""
    plan, leads = context.plan, context.ranks.leads
    if plan.evaluation is None or not leads:
        return None
    given = (context.manifest, context.family, context.cache, context.device)
    return Judge(plan, *given, done=done, met=judged(plan, context.clock.gauge))


def measure_loss(
    context: Context,
    trained: Trained,
    judge: Judge | None,
    trackers: Sequence[Tracker],
    step: int,
) -> None:
    """Measure the evaluation loss after `step` updates, unless it is known."""
    if judge is None or step in judge.measured:
        return
    with context.clock.phase("evaluate"), kept(trained):
        judge.judge(
            trained.model,
            trained.ema,
            step,
            context.events,
            trackers,
            context.stop,
            words=trained.text,
        )
    if step < context.plan.steps.total:
        announce(context, step)
