"""Runs a plan from start to end, in the run folder, going on from what is there.

Phases: caches (text, latents), model, training, result, pictures. Every phase leaves whole files,
so that a run which is killed anywhere and started again ends with the same weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import frozen
from safetensors import SafetensorError

from compiler.data.manifest import Manifest
from compiler.plan import Plan
from runtime import files, folder
from runtime.checkpoints import set_aside
from runtime.clock import Clock, failed_in
from runtime.context import (
    LOG,
    Context,
    as_leader_at_end,
    result_folder,
    saved_step,
)
from runtime.data.cache import Cache
from runtime.data.fill import fill_latents, fill_text
from runtime.data.leaks import warn_of_leaks
from runtime.data.pages import trimmed
from runtime.data.sharing import team_of
from runtime.device import check_size, device_of
from runtime.errors import RunFailed
from runtime.events import Events
from runtime.families import family_of
from runtime.journal import EVENTS, Journal
from runtime.measured import measured
from runtime.optimizers import check_usable
from runtime.out_of_memory import is_out_of_memory, refusal
from runtime.publish.publisher import Publisher, catch_up
from runtime.quiet import native_output, quiet
from runtime.ranks import ALONE, Ranks
from runtime.result import export_result, go_back
from runtime.result_step import result_step
from runtime.resume import model_of, prepared
from runtime.seeing import draw_result, draw_samples, judge_of, measure_loss, painter_of
from runtime.speed import check_speed
from runtime.stop import Stop
from runtime.track import Tracker, open_trackers
from runtime.training import train_from
from runtime.zero import check_zero

_FINISHED = "finished"


@frozen(kw_only=True)
class Outcome:
    """How a run ended. `result` is the folder of the weights, once finished."""

    status: Literal["finished", "stopped", "already"]
    run_folder: Path
    step: int  # updates done
    result: Path | None
    measured: dict[str, Any]


def execute(
    plan: Plan, manifest: Manifest, events: Events, recipe: str = "", ranks: Ranks = ALONE
) -> Outcome:
    """Do what `plan` says; `recipe` is the text it was compiled from, kept in the run folder.

    With several ranks each of them calls this with the same plan, and rank 0's outcome is what
    counts. Returns early, with a checkpoint saved, if Ctrl-C or SIGTERM asks for it.

    Raises:
        PlanChanged: the run folder was begun with a plan that trains otherwise.
        MachineUnfit: a device or package that the plan needs is not here.
        RunFailed: the run can't go on; what was saved before is whole.
    """
    try:
        return _executed(plan, manifest, events, recipe, ranks)
    except RunFailed:  # some are errors of the system too, and say more
        raise
    except OSError as error:  # a disk that is full where the run begins or ends
        raise _of_system(error) from error


def _of_system(error: OSError | SafetensorError) -> RunFailed:
    return RunFailed(str(error), help="what was saved before is whole: run again")


def _executed(plan: Plan, manifest: Manifest, events: Events, recipe: str, ranks: Ranks) -> Outcome:
    with _opened(plan, recipe, ranks) as run_folder:
        manifest.to_disk(run_folder)
        trimmed()
        found = folder.read_measured(run_folder)
        accepted = folder.is_accepted(run_folder, plan)  # a finished run may be given more steps
        finished = found is not None and result_folder(plan).is_dir() and not accepted
        if ranks.told(_FINISHED if finished else "") == _FINISHED:
            events.message(f"{run_folder} is finished ({plan.steps.total} steps); nothing to do")
            if ranks.leads:
                _publish_later(plan, run_folder, events)
            return _outcome(plan, "already", plan.steps.total, found)
        looked_at = run_folder if ranks.leads else None
        events = journal = Journal(run_folder / EVENTS if ranks.leads else Path(os.devnull), events)
        with quiet(run_folder / LOG), Stop(events, looked_at, ranks).listening() as stop:
            device = device_of(plan, ranks)
            check_size(plan, device)
            context = Context(
                plan=plan,
                manifest=manifest,
                family=family_of(plan.model.family),
                cache=Cache(Path(plan.cache_folder), run=plan.run_folder),
                device=device,
                folder=run_folder,
                events=events,
                stop=stop,
                clock=Clock(device),
                ranks=ranks,
                publisher=Publisher(plan, run_folder, events, leads=ranks.leads),
            )
            return _noted(context, journal)


def _opened(plan: Plan, recipe: str, ranks: Ranks) -> AbstractContextManager[Path]:
    """The run folder; it is rank 0's to lock and to write."""
    return folder.opened(plan, recipe) if ranks.leads else nullcontext(Path(plan.run_folder))


def _noted(context: Context, journal: Journal) -> Outcome:
    """Run, with beginning and end written down and told."""
    publisher = context.publisher
    publisher.check()
    begun = 0
    if context.ranks.leads:  # the others look once they have met
        set_aside(context.folder / "checkpoints", context.events)
        begun = saved_step(context.folder)
        catch_up(publisher, context.folder)  # what was killed before it was uploaded
    journal.note(f"plan {context.plan.digest[:12]} on {context.device}", step=begun)
    publisher.tell("began", begun)
    finished = False
    try:
        outcome = _guarded(context)
        finished = outcome.status == "finished"
        journal.note(outcome.status, step=outcome.step)
        if finished and context.ranks.leads:
            _publish(publisher, context.plan, context.folder)
        publisher.tell(outcome.status, outcome.step)
    except BaseException as error:
        text = error.message if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
        journal.note(text, "error")
        publisher.tell("failed", saved_step(context.folder), text)
        raise
    finally:
        publisher.close(finished=finished)
    return outcome


def _publish(publisher: Publisher, plan: Plan, run_folder: Path) -> None:
    """What there is of a finished run and not on the hub."""
    catch_up(publisher, run_folder)
    step = result_step(run_folder, plan)
    publisher.result(result_folder(plan), _recipe_in(run_folder), step)


def _publish_later(plan: Plan, run_folder: Path, events: Events) -> None:
    """What a finished run could not publish when it ended."""
    publisher = Publisher(plan, run_folder, events)
    publisher.check()
    if plan.publish is None or not plan.publish.hub:
        return
    with quiet(run_folder / LOG):
        _publish(publisher, plan, run_folder)
        publisher.close(finished=True)


def _recipe_in(run_folder: Path) -> str:
    path = run_folder / "recipe.toml"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _guarded(context: Context) -> Outcome:
    """Run, with what the machine lacks turned into errors that say so."""
    try:
        return _run(context)
    except KeyboardInterrupt:
        return _outcome(context.plan, "stopped", saved_step(context.folder), {})
    except RunFailed:
        raise
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise refusal(context.plan, failed_in(error), error, context.device) from error
        if isinstance(error, OSError | SafetensorError):  # no base there, a disk that is full
            raise _of_system(error) from error
        raise


def _outcome(
    plan: Plan, status: Literal["finished", "stopped", "already"], step: int, measured: Any
) -> Outcome:
    return Outcome(
        status=status,
        run_folder=Path(plan.run_folder),
        step=step,
        result=None if status == "stopped" else result_folder(plan),
        measured=measured,
    )


def _run(context: Context) -> Outcome:
    plan, ranks = context.plan, context.ranks
    check_usable(plan.optimizer, plan.device)
    check_speed(plan.speed, plan.device)
    check_zero(plan)
    torch.set_num_threads(plan.threads)  # sums are split by threads: part of the trajectory
    trackers = _trackers(context)
    try:
        with ranks.alive():
            _fill(context)
        with context.clock.phase("load"):
            context.events.phase("load", 0, "")
            with native_output(context.folder / LOG):
                ranks.form(context.device)
            built, shards = model_of(context)
        with context.clock.phase("prepare"):  # not planned as a part of loading
            trained, done = prepared(context, built, shards)
            _agree(context, done)
            if ranks.leads:
                folder.take_over(context.folder)
        painter = painter_of(context, trained, trackers)
        judge = judge_of(context, done)
        reached = train_from(context, built, trained, painter, judge, trackers, done)
        if trained.shards is None:  # what follows is rank 0's alone
            ranks.leave()
        if reached < plan.steps.total:
            return _outcome(plan, "stopped", reached, {})
        if not ranks.leads and trained.shards is None:
            return _outcome(plan, "finished", reached, {})
        goes_back = plan.checkpoints.result == "best"
        if not goes_back:
            export_result(context, built, trained, reached)
        as_leader_at_end(context, trained, lambda: draw_samples(context, trained, painter, reached))
        as_leader_at_end(
            context, trained, lambda: measure_loss(context, trained, judge, trackers, reached)
        )
        if goes_back:  # only now is the last one judged, too
            best = go_back(context, built, trained)
            if best is not None:
                as_leader_at_end(
                    context, trained, lambda: draw_result(context, trained, painter, best)
                )
            export_result(context, built, trained, reached if best is None else best)
        if trained.shards is not None:
            ranks.most(0)  # all have heard rank 0's last word, which ends with its process
            ranks.leave()
        if not ranks.leads:
            return _outcome(plan, "finished", reached, {})
    finally:
        for tracker in trackers:
            tracker.close()
    found = measured(plan, trained, context.clock, context.device)
    files.write_whole(context.folder / folder.MEASURED, json.dumps(found, indent=2) + "\n")
    return _outcome(plan, "finished", reached, found)


def _trackers(context: Context) -> Sequence[Tracker]:
    """Rank 0's; the others tell nobody."""
    if not context.ranks.leads:
        return ()
    saved = saved_step(context.folder)
    return open_trackers(context.plan, context.folder, saved, context.events)


def _agree(context: Context, done: int) -> None:
    """Raises RunFailed if the ranks don't go on from the same step."""
    steps = context.ranks.words(str(done))
    if len(set(steps)) > 1:
        raise RunFailed(
            f"the ranks found checkpoints of different steps: {', '.join(steps)}",
            help=f"all machines must see the same files in {context.folder}",
        )


def _fill(context: Context) -> None:
    """Cache embeddings and latents, each rank its share; the encoders are gone afterwards."""
    plan, clock, team = context.plan, context.clock, team_of(context.ranks)
    given = (plan, context.manifest, context.family, context.cache, context.events)
    with clock.phase("text"):
        fill_text(*given, phase=clock.phase, team=team, gauge=clock.gauge)
    with clock.phase("latents"):
        fill_latents(*given, team=team, gauge=clock.gauge)
        if (judged := context.manifest.held_out) is not None:
            given = (plan, judged, context.family, context.cache, context.events)
            fill_latents(*given, team=team, gauge=clock.gauge)
            if context.ranks.leads:
                warn_of_leaks(plan, context.manifest, context.cache, context.events)
