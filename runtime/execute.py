"""Runs a plan from start to end, in the run folder, going on from what is there.

Phases: caches (text, latents), model, training, result, pictures. Every phase leaves whole files,
so that a run which is killed anywhere and started again ends with the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import frozen

from compiler.data.manifest import Manifest
from compiler.optimizers import saved_bytes
from compiler.plan import Plan
from runtime import checkpoints, files, folder
from runtime.build import Built, build, load_state, state
from runtime.checkpoints import Snapshot
from runtime.clock import Clock
from runtime.data.cache import Cache
from runtime.data.feed import Feed, Window
from runtime.data.fill import fill_latents, fill_text, prompt_embeddings
from runtime.ema import Ema
from runtime.errors import MachineUnfit, RunFailed
from runtime.events import Events
from runtime.families import family_of
from runtime.families.base import Family
from runtime.families.common import DTYPES
from runtime.fused_backward import FusedBackward
from runtime.journal import EVENTS, Journal
from runtime.loop import Actions, Trained, due, train
from runtime.machine import versions
from runtime.measured import measured
from runtime.methods import full, lora
from runtime.optimizers import check_usable, host_state, kept_weights, make_optimizer, to_host
from runtime.optimizers import load_state as load_optimizer
from runtime.out_of_memory import is_out_of_memory, refusal
from runtime.quiet import quiet
from runtime.stop import Stop
from runtime.track import METRICS, Tracker, open_trackers, rows
from runtime.validate import Painter, is_complete, measure, validate

LOG = "run.log"


@frozen(kw_only=True)
class Outcome:
    """How a run ended. `result` is the folder of the weights, once finished."""

    status: Literal["finished", "stopped", "already"]
    run_folder: Path
    step: int  # updates done
    result: Path | None
    measured: dict[str, Any]


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


def execute(plan: Plan, manifest: Manifest, events: Events, recipe: str = "") -> Outcome:
    """Do what `plan` says; `recipe` is the text it was compiled from, kept in the run folder.

    Returns early, with a checkpoint saved, if Ctrl-C or SIGTERM asks for it.

    Raises:
        PlanChanged: the run folder was begun with a plan that trains otherwise.
        MachineUnfit: a device or package that the plan needs is not here.
        RunFailed: the run can't go on; what was saved before is whole.
    """
    with folder.opened(plan, recipe) as run_folder:
        found = folder.read_measured(run_folder)
        if found is not None and result_folder(plan).is_dir():
            events.message(f"{run_folder} is finished ({plan.steps.total} steps); nothing to do")
            return _outcome(plan, "already", plan.steps.total, found)
        events = journal = Journal(run_folder / EVENTS, events)
        with quiet(run_folder / LOG), Stop(events, run_folder).listening() as stop:
            device = device_of(plan)
            context = Context(
                plan=plan,
                manifest=manifest,
                family=family_of(plan.model.family),
                cache=Cache(Path(plan.cache_folder)),
                device=device,
                folder=run_folder,
                events=events,
                stop=stop,
                clock=Clock(device),
            )
            return _noted(context, journal)


def _noted(context: Context, journal: Journal) -> Outcome:
    """Run, with beginning and end written down."""
    begun = _saved_step(context.folder)
    journal.note(f"plan {context.plan.digest[:12]} on {context.device}", step=begun)
    try:
        outcome = _guarded(context)
    except RunFailed as error:
        journal.note(error.message, "error")
        raise
    except BaseException as error:
        journal.note(f"{type(error).__name__}: {error}", "error")
        raise
    journal.note(outcome.status, step=outcome.step)
    return outcome


def _guarded(context: Context) -> Outcome:
    """Run, with what the machine lacks turned into errors that say so."""
    try:
        return _run(context)
    except KeyboardInterrupt:
        return _outcome(context.plan, "stopped", _saved_step(context.folder), {})
    except RunFailed:
        raise
    except OSError as error:  # a base that can't be found or downloaded, a disk that is gone
        raise RunFailed(str(error), help="what was saved before is whole: run again") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise refusal(context.plan, context.clock.failed, error, context.device) from error


def _saved_step(run_folder: Path) -> int:
    """Updates done in the latest checkpoint; 0 without one."""
    saved = checkpoints.latest(run_folder / "checkpoints")
    return int(checkpoints.read_state(saved)["step"]) if saved else 0


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


def result_folder(plan: Plan) -> Path:
    """Where the trained weights end up: `lora` or `model` in the run folder."""
    return Path(plan.run_folder) / ("model" if plan.adapter is None else plan.adapter.kind)


def device_of(plan: Plan) -> torch.device:
    """The plan's device. Raises MachineUnfit if torch can't use it here."""
    usable: dict[str, Callable[[], bool]] = {
        "cpu": lambda: True,
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
    }
    if not usable[plan.device]():
        raise MachineUnfit(
            f"the plan runs on {plan.device}, which torch {torch.__version__} can't use here",
            help="`tuner doctor` shows what it finds",
        )
    return torch.device(plan.device)


def _run(context: Context) -> Outcome:
    plan = context.plan
    check_usable(plan.optimizer, plan.device)
    torch.set_num_threads(plan.threads)  # sums are split by threads: part of the trajectory
    trackers = open_trackers(plan, context.folder, _saved_step(context.folder), context.events)
    try:
        _fill(context)
        with context.clock.phase("load"):
            context.events.phase("load", 0, "")
            built, trained, done = _prepare(context)
        painter = _painter(context, trained, trackers)
        reached = _train(context, built, trained, painter, trackers, done)
        if reached < plan.steps.total:
            return _outcome(plan, "stopped", reached, {})
        with _kept(trained):
            _export(context, built, trained)
        _validate(context, trained, painter, reached)
    finally:
        for tracker in trackers:
            tracker.close()
    found = measured(plan, trained, context.clock, context.device)
    files.write_whole(context.folder / folder.MEASURED, json.dumps(found, indent=2) + "\n")
    return _outcome(plan, "finished", reached, found)


def _fill(context: Context) -> None:
    """Cache embeddings and latents; the encoders are gone afterwards."""
    plan, clock = context.plan, context.clock
    given = (plan, context.manifest, context.family, context.cache, context.events)
    with clock.phase("text"):
        fill_text(*given, phase=clock.phase)
    with clock.phase("latents"):
        fill_latents(*given)


def _prepare(context: Context) -> tuple[Built, Trained, int]:
    """The model and all that is trained, as the latest checkpoint left it; and the updates done."""
    plan = context.plan
    built = _built(context)
    optimizer = make_optimizer(plan.optimizer, built.trainable.items(), context.device)
    fused = plan.memory.layout.fused_backward
    trained = Trained(
        family=context.family,
        model=built.model,
        parameters=built.trainable,
        optimizer=optimizer,
        ema=Ema(plan.ema, built.trainable.items()) if plan.ema else None,
        fused=FusedBackward(built.model, built.trainable, optimizer) if fused else None,
    )
    return built, trained, _resume(context, built, trained)


def _built(context: Context) -> Built:
    plan = context.plan
    try:
        return build(
            plan.model,
            plan.adapter,
            plan.precision,
            plan.memory.layout,
            context.family,
            context.device,
            empty=False,
            seed=plan.seed,
        )
    except ValueError as error:
        raise RunFailed(f"the model can't be built as planned: {error}") from error


def _resume(context: Context, built: Built, trained: Trained) -> int:
    saved = checkpoints.latest(context.folder / "checkpoints")
    if saved is None:
        return 0
    snapshot = checkpoints.load(saved)
    load_state(built, snapshot.weights)
    load_optimizer(trained.optimizer, dict(snapshot.optimizer))
    if trained.ema is not None and snapshot.ema is not None:
        trained.ema.load_state(snapshot.ema)
    context.events.message(f"going on from step {snapshot.step} of {context.plan.steps.total}")
    return snapshot.step


def _train(
    context: Context,
    built: Built,
    trained: Trained,
    painter: Painter | None,
    trackers: Sequence[Tracker],
    done: int,
) -> int:
    """Train from `done` updates on; returns those reached."""
    plan = context.plan
    actions = Actions(
        checkpoint=lambda step, epoch: _save(context, built, trained, step, epoch),
        validate=lambda step: _validate(context, trained, painter, step),
    )
    with context.stop.patient():
        if (done == 0 and plan.validation.at_start) or due(done, plan.validation.every):
            _validate(context, trained, painter, done)
        if context.stop.requested or done == plan.steps.total:
            return done
        _check_space(context, trained)
        feed = Feed(plan, context.manifest, context.family, context.cache, context.device)
        with context.clock.phase("train"), closing(_windows(feed, done)) as windows:
            _announce(context, done)
            return train(
                plan,
                trained,
                windows,
                done,
                events=context.events,
                trackers=trackers,
                actions=actions,
                stop=context.stop,
                history=rows(context.folder / METRICS),
            )


def _windows(feed: Feed, done: int) -> Generator[Window, None, None]:
    """Ends the feed's thread when it is closed."""
    yield from feed.windows(done)


def _announce(context: Context, done: int) -> None:
    context.events.phase("train", context.plan.steps.total, "steps")
    context.events.advance(done)


def _save(context: Context, built: Built, trained: Trained, step: int, epoch: int) -> None:
    root = context.folder / "checkpoints"
    if checkpoints.is_complete(checkpoints.folder_of(root, step)):
        return
    with context.clock.phase("save"):
        context.events.phase("save", 0, "")
        snapshot = Snapshot(
            step=step,
            epoch=epoch,
            plan=context.plan.digest,
            weights=to_host(state(built)),
            optimizer=host_state(trained.optimizer),
            ema=trained.ema.state() if trained.ema else None,
            versions=versions(),
        )
        checkpoints.save(root, snapshot)
        checkpoints.prune(root, context.plan.checkpoints.keep)
    _announce(context, step)


def _kept(trained: Trained) -> AbstractContextManager[None]:
    """Inside, the weights are those to be judged and kept."""
    return kept_weights(trained.optimizer, trained.parameters.values())


def _validate(context: Context, trained: Trained, painter: Painter | None, step: int) -> None:
    if painter is None or is_complete(context.plan, step):
        return
    with context.clock.phase("validate"), _kept(trained):
        validate(painter, step)
    if step < context.plan.steps.total:
        _announce(context, step)


def _export(context: Context, built: Built, trained: Trained) -> None:
    """Write the result, whole. With an average it is the average, as in the pictures."""
    plan = context.plan
    method = full if plan.adapter is None else lora
    target = result_folder(plan)
    if target.is_dir():
        return
    with context.clock.phase("export"), files.partial_folder(target) as place:
        weights = trained.ema.average if trained.ema else None
        method.export(built, plan.model, context.family, place, weights=weights)


def _painter(context: Context, trained: Trained, trackers: Sequence[Tracker]) -> Painter | None:
    """What draws the plan's pictures; None where it has no prompts. The VAE waits on the host."""
    plan, family = context.plan, context.family
    if not plan.validation.prompts:
        return None
    if plan.validation.score:
        measure(plan.validation.score)  # a name that is not there should fail now
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
        scheduler=family.load(plan.model, "scheduler", torch.float32, host),
        positive=prompt_embeddings(plan, family, context.cache, texts),
        negative=negative[plan.validation.negative],
        ema=trained.ema,
        trackers=trackers,
        events=context.events,
        stop=context.stop,
    )


def _check_space(context: Context, trained: Trained) -> None:
    """A checkpoint that can't be written should be found before the steps that lead to it."""
    plan = context.plan
    count = sum(p.numel() for p in trained.parameters.values())
    weights = sum(p.nbytes for p in trained.parameters.values())
    needed = weights + saved_bytes(plan.optimizer.name, plan.precision.trained, count)
    if trained.ema is not None:
        needed += 4 * count
    folder.check_space(context.folder, needed)
