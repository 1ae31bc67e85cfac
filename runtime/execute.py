"""Runs a plan from start to end, in the run folder, going on from what is there.

Phases: caches (text, latents), model, training, result, pictures. Every phase leaves whole files,
so that a run which is killed anywhere and started again ends with the same weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor

from compiler.adapters import result_name
from compiler.data.manifest import Manifest
from compiler.keeping import CLIP_SCORE
from compiler.optimizers import saved_bytes
from compiler.plan import Plan
from runtime import checkpoints, files, folder, sharded_saving, zero_saving
from runtime.build import Built, build, load_state, state
from runtime.checkpoints import Snapshot
from runtime.clock import Clock
from runtime.data.cache import Cache
from runtime.data.feed import Feed, Window
from runtime.data.fill import fill_latents, fill_text, prompt_embeddings
from runtime.data.sharing import team_of
from runtime.ema import Ema
from runtime.errors import MachineUnfit, RunFailed
from runtime.evaluate import Judge
from runtime.events import Events
from runtime.families import family_of
from runtime.families.base import Family
from runtime.families.common import DTYPES
from runtime.families.sana_sprint import FAMILY as SPRINT
from runtime.families.sana_sprint import few_steps, scheduler
from runtime.fused_backward import FusedBackward
from runtime.host_copy import HostCopy
from runtime.journal import EVENTS, Journal
from runtime.loop import Actions, Side, Trained, due, train
from runtime.machine import versions
from runtime.measured import measured
from runtime.methods import full, lora
from runtime.optimizers import check_usable, kept_weights, make_optimizer
from runtime.optimizers import load_state as load_optimizer
from runtime.out_of_memory import is_out_of_memory, refusal
from runtime.publish.publisher import Publisher, catch_up
from runtime.quiet import native_output, quiet
from runtime.ranks import ALONE, Ranks
from runtime.samplers import sampler
from runtime.saving import Saver, best, prune
from runtime.scaler import scaler_for
from runtime.scores.clip import ClipScore
from runtime.sharded import Shards, sharded
from runtime.speed import check_speed, prepare
from runtime.stop import Stop
from runtime.together import Together
from runtime.track import METRICS, Tracker, open_trackers, rows
from runtime.validate import Painter, is_done, measure, validate
from runtime.zero import Zero, check_zero, zeroed

LOG = "run.log"
_FINISHED = "finished"


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
    ranks: Ranks
    publisher: Publisher


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
    except OSError as error:  # a disk that is full where the run begins or ends
        raise _of_system(error) from error


def _of_system(error: OSError) -> RunFailed:
    return RunFailed(str(error), help="what was saved before is whole: run again")


def _executed(plan: Plan, manifest: Manifest, events: Events, recipe: str, ranks: Ranks) -> Outcome:
    with _opened(plan, recipe, ranks) as run_folder:
        found = folder.read_measured(run_folder)
        finished = found is not None and result_folder(plan).is_dir()
        if ranks.told(_FINISHED if finished else "") == _FINISHED:
            events.message(f"{run_folder} is finished ({plan.steps.total} steps); nothing to do")
            if ranks.leads:
                _publish(plan, run_folder, events)
            return _outcome(plan, "already", plan.steps.total, found)
        looked_at = run_folder if ranks.leads else None
        events = journal = Journal(run_folder / EVENTS if ranks.leads else Path(os.devnull), events)
        with quiet(run_folder / LOG), Stop(events, looked_at, ranks).listening() as stop:
            device = device_of(plan, ranks)
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
    begun = saved_step(context.folder)
    if context.ranks.leads:
        catch_up(publisher, context.folder)  # what was killed before it was uploaded
    journal.note(f"plan {context.plan.digest[:12]} on {context.device}", step=begun)
    publisher.tell("began", begun)
    finished = False
    try:
        outcome = _guarded(context)
        finished = outcome.status == "finished"
        journal.note(outcome.status, step=outcome.step)
        if finished and outcome.result:
            publisher.result(outcome.result, _recipe_in(context.folder), outcome.step)
        publisher.tell(outcome.status, outcome.step)
    except BaseException as error:
        text = error.message if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
        journal.note(text, "error")
        publisher.tell("failed", saved_step(context.folder), text)
        raise
    finally:
        publisher.close(finished=finished)
    return outcome


def _publish(plan: Plan, run_folder: Path, events: Events) -> None:
    """What a finished run could not publish when it ended."""
    publisher = Publisher(plan, run_folder, events)
    publisher.check()
    catch_up(publisher, run_folder)
    publisher.result(result_folder(plan), _recipe_in(run_folder), plan.steps.total)
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
    except OSError as error:  # a base that can't be found or downloaded, a disk that is gone
        raise _of_system(error) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise refusal(context.plan, context.clock.failed, error, context.device) from error


def saved_step(run_folder: Path) -> int:
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
    return Path(plan.run_folder) / result_name(plan.adapter)


def device_of(plan: Plan, ranks: Ranks = ALONE) -> torch.device:
    """The plan's device, of several CUDA devices the one of this rank, which becomes the current
    one. Raises MachineUnfit if torch can't use it here."""
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
    if plan.device == "cuda" and ranks.count > 1:
        count = torch.cuda.device_count()
        if ranks.local >= count:
            raise MachineUnfit(
                f"rank {ranks.rank} is to train on cuda:{ranks.local}, and this machine has "
                f"{count} CUDA device{'s' * (count != 1)}",
                help="set launch.devices to how many there are",
            )
        torch.cuda.set_device(ranks.local)
        return torch.device("cuda", ranks.local)
    return torch.device(plan.device)


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
            built, trained, done = _prepare(context)
            _agree(context, done)
        painter = _painter(context, trained, trackers)
        judge = _judge(context, done)
        reached = _train(context, built, trained, painter, judge, trackers, done)
        if trained.shards is None:  # what follows is rank 0's alone
            ranks.leave()
        if reached < plan.steps.total:
            return _outcome(plan, "stopped", reached, {})
        if not ranks.leads and trained.shards is None:
            return _outcome(plan, "finished", reached, {})
        goes_back = plan.checkpoints.result == "best"
        if not goes_back:
            _export(context, built, trained)
        _at_end(context, trained, lambda: _validate(context, trained, painter, reached))
        _at_end(context, trained, lambda: _evaluate(context, trained, judge, trackers, reached))
        if goes_back:  # only now is the last one judged, too
            _go_back(context, built, trained)
            _export(context, built, trained)
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


def _led(context: Context, trained: Trained, task: Callable[[], None]) -> None:
    """Rank 0 does `task`, which may call the model; the others wait until it is done."""
    if trained.shards is None:
        context.ranks.led(task)
    else:
        trained.shards.led(task, trained.ema, _kept(trained))


def _at_end(context: Context, trained: Trained, task: Callable[[], None]) -> None:
    """As `_led`, when ranks that hold the whole model have nothing to wait for."""
    if trained.shards is None:
        task()
    else:
        _led(context, trained, task)


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
        fill_text(*given, phase=clock.phase, team=team)
    with clock.phase("latents"):
        fill_latents(*given, team=team)
        if (judged := context.manifest.held_out) is not None:
            fill_latents(plan, judged, context.family, context.cache, context.events, team=team)


def _prepare(context: Context) -> tuple[Built, Trained, int]:
    """The model and all that is trained, as the latest checkpoint left it; and the updates done."""
    plan = context.plan
    built = _built(context)
    shards: Together | None = None
    if _is_sharded(context):
        given = (built, plan, context.family, context.device, context.ranks)
        zero = plan.sharing.strategy == "deepspeed"
        with native_output(context.folder / LOG):  # DeepSpeed tries a compiler, which complains
            built, shards = zeroed(*given) if zero else sharded(*given)
    if isinstance(shards, Zero):
        optimizer = shards.optimizer
    else:
        optimizer = make_optimizer(plan.optimizer, built.trainable.items(), context.device)
    fused = plan.memory.layout.fused_backward
    trained = Trained(
        family=context.family,
        model=built.model,
        parameters=built.trainable,
        optimizer=optimizer,
        ema=Ema(plan.ema, built.trainable.items()) if plan.ema else None,
        fused=FusedBackward(built.model, built.trainable, optimizer) if fused else None,
        shards=shards,
        scaler=scaler_for(plan.precision, context.device),
        method=built.method,
        rival=_rival(plan, built, context.device),
    )
    return built, trained, _resume(context, built, trained)


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


def _is_sharded(context: Context) -> bool:
    return context.plan.sharing.strategy != "ddp" and context.ranks.count > 1


def _built(context: Context) -> Built:
    """The model; what will be dealt out over the ranks waits in host memory."""
    plan, apart = context.plan, _is_sharded(context)
    prepare(plan)
    try:
        return build(
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
        )
    except ValueError as error:
        raise RunFailed(f"the model can't be built as planned: {error}") from error


def _resume(context: Context, built: Built, trained: Trained) -> int:
    saved = checkpoints.latest(context.folder / "checkpoints")
    if saved is None:
        return 0
    zero_saving.judge(saved, context.plan)
    step = _load(saved, built, trained)
    context.events.message(f"going on from step {step} of {context.plan.steps.total}")
    return step


def _load(saved: Path, built: Built, trained: Trained) -> int:
    """Everything that is trained as it was after the step that is returned."""
    if trained.shards is not None:
        given = (trained.optimizer, trained.ema)
        if isinstance(trained.shards, Zero):
            return zero_saving.restore(saved, trained.shards, *given)
        assert isinstance(trained.shards, Shards)
        return sharded_saving.restore(saved, trained.shards, *given)
    snapshot = checkpoints.load(saved)
    load_state(built, snapshot.weights)
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


def _go_back(context: Context, built: Built, trained: Trained) -> None:
    """Take up the best checkpoint, for the result."""
    if _has_result(context):
        return
    rules, root = context.plan.checkpoints, context.folder / "checkpoints"
    found = best(root, rules, context.folder / METRICS)
    if (word := context.ranks.told("" if found is None else str(found))) == "":
        context.events.message(f"no checkpoint has a {rules.best}: the last is taken", "warning")
        return
    step = int(word)
    _load(checkpoints.folder_of(root, step), built, trained)
    context.events.message(f"the result is that of step {step}, the best by {rules.best}")


def _train(
    context: Context,
    built: Built,
    trained: Trained,
    painter: Painter | None,
    judge: Judge | None,
    trackers: Sequence[Tracker],
    done: int,
) -> int:
    """Train from `done` updates on; returns those reached."""
    with closing(HostCopy(context.device)) as room, _saver(context) as saver:

        def led(step: int, epoch: int) -> None:
            if saver.has(step):
                return
            with context.clock.phase("save"):
                context.events.phase("save", 0, "")
                saver.save(step, lambda: _copied(context, built, trained, room, step, epoch))
            _announce(context, step)

        def save(step: int, epoch: int) -> None:
            if trained.shards is not None:
                _save_shards(context, trained, trained.shards, step, epoch)
            else:
                context.ranks.led(lambda: led(step, epoch))

        def draw(step: int) -> None:
            _led(context, trained, lambda: _validate(context, trained, painter, step))

        def evaluate(step: int) -> None:
            _led(context, trained, lambda: _evaluate(context, trained, judge, trackers, step))

        actions = Actions(checkpoint=save, validate=draw, evaluate=evaluate, check=saver.check)
        return _updated(context, trained, trackers, actions, done)


def _updated(
    context: Context, trained: Trained, trackers: Sequence[Tracker], actions: Actions, done: int
) -> int:
    """Train from `done` updates on, with `actions` between them; returns those reached."""
    plan, ranks = context.plan, context.ranks
    with context.stop.patient():
        if (done == 0 and plan.validation.at_start) or due(done, plan.validation.every):
            actions.validate(done)
        if plan.evaluation is not None and due(done, plan.evaluation.every):  # also at the start
            actions.evaluate(done)
        if context.stop.requested or done == plan.steps.total:
            return done
        if ranks.leads:
            _check_space(context, trained)
        feed = Feed(
            plan,
            context.manifest,
            context.family,
            context.cache,
            context.device,
            rank=ranks.rank,
        )
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
                history=rows(context.folder / METRICS, done),
                ranks=ranks,
            )


def _windows(feed: Feed, done: int) -> Generator[Window, None, None]:
    """Ends the feed's thread when it is closed."""
    yield from feed.windows(done)


def _announce(context: Context, done: int) -> None:
    context.events.phase("train", context.plan.steps.total, "steps")
    context.events.advance(done)


def _copied(
    context: Context, built: Built, trained: Trained, room: HostCopy, step: int, epoch: int
) -> Snapshot:
    """The run's state after `step` updates, in host memory."""
    rival = trained.rival
    tree = (
        state(built),
        trained.optimizer.state_dict(),
        trained.ema and trained.ema.average,
        rival and rival.state,
        rival and rival.optimizer.state_dict(),
    )
    weights, optimizer, average, rivals, rivals_optimizer = room.take(tree)
    return Snapshot(
        step=step,
        epoch=epoch,
        plan=context.plan.digest,
        weights=weights,
        optimizer=optimizer,
        ema=average,
        versions=versions(),
        scaler=trained.scaler.state() if trained.scaler else None,
        rival=rivals,
        rival_optimizer=rivals_optimizer,
    )


def _save_shards(
    context: Context, trained: Trained, shards: Together, step: int, epoch: int
) -> None:
    """Save, all ranks together, before training goes on."""
    root, metrics = context.folder / "checkpoints", context.folder / METRICS
    there = checkpoints.is_complete(checkpoints.folder_of(root, step))
    if context.ranks.told("there" if there else "") == "there":
        return
    head = Snapshot(
        step=step,
        epoch=epoch,
        plan=context.plan.digest,
        weights={},
        optimizer={},
        ema=None,
        versions=versions(),
    )
    with context.clock.phase("save"):
        context.events.phase("save", 0, "")
        if context.ranks.leads and metrics.exists():
            files.sync(metrics)
        given = (trained.optimizer, trained.ema, context.ranks)
        if isinstance(shards, Zero):
            saved = zero_saving.save(root, head, shards, *given)
        else:
            assert isinstance(shards, Shards)
            saved = sharded_saving.save(root, head, shards, *given)
        if context.ranks.leads:
            context.publisher.checkpoint(saved, step)
            prune(root, context.plan.checkpoints, metrics)
    _announce(context, step)


@contextmanager
def _saver(context: Context) -> Iterator[Saver]:
    """What saves; nothing is under way any more when the block has ended."""
    root, rules = context.folder / "checkpoints", context.plan.checkpoints
    metrics = context.folder / METRICS
    saver = Saver(root, rules, metrics, context.publisher.checkpoint)
    if context.ranks.leads:
        prune(root, rules, metrics)  # a run that was killed may have saved and not deleted
    try:
        yield saver
    except BaseException:
        try:
            saver.finish()
        except RunFailed as error:  # the first one is raised
            context.events.message(error.message, "error")
        raise
    saver.finish()


def _kept(trained: Trained) -> AbstractContextManager[None]:
    """Inside, the weights are those to be judged and kept."""
    return kept_weights(trained.optimizer, trained.parameters.values())


def _validate(context: Context, trained: Trained, painter: Painter | None, step: int) -> None:
    if painter is None or is_done(painter, step):
        return
    with context.clock.phase("validate"), _kept(trained):
        validate(painter, step)
    if step < context.plan.steps.total:
        _announce(context, step)


def _evaluate(
    context: Context,
    trained: Trained,
    judge: Judge | None,
    trackers: Sequence[Tracker],
    step: int,
) -> None:
    if judge is None or step in judge.measured:
        return
    with context.clock.phase("evaluate"), _kept(trained):
        judge.judge(trained.model, trained.ema, step, context.events, trackers, context.stop)
    if step < context.plan.steps.total:
        _announce(context, step)


def _judge(context: Context, done: int) -> Judge | None:
    """What measures the evaluation loss; None where nothing is held out to measure it on."""
    plan, leads = context.plan, context.ranks.leads
    if plan.evaluation is None or not leads:
        return None
    given = (context.manifest, context.family, context.cache, context.device)
    return Judge(plan, *given, done=done)


def _export(context: Context, built: Built, trained: Trained) -> None:
    """Write the result, whole. With an average it is the average, as in the pictures, or, where the
    plan saves both, the trained weights with the average beside them."""
    plan = context.plan
    method = full if plan.adapter is None else lora
    target = result_folder(plan)
    if _has_result(context):
        return
    both = plan.ema is not None and plan.ema.save == "both"
    with context.clock.phase("export"), _kept(trained):
        average, weights = _results(built, trained, both=both)
        if not context.ranks.leads:
            return
        if both and plan.adapter is not None:  # first: the result's own folder says it is finished
            with files.partial_folder(target.with_name(f"{target.name}_ema")) as place:
                method.export(built, plan.model, context.family, place, weights=average)
        with files.partial_folder(target) as place:
            method.export(built, plan.model, context.family, place, weights=weights)
            if plan.sprint is not None:
                few_steps(plan.sprint, place)
            if both and plan.adapter is None and average is not None:
                component = f"{plan.model.trained_component}_ema"
                full.save_component(built.model, average, None, place / component)


def _has_result(context: Context) -> bool:
    """Whether the result is there already: rank 0 looks."""
    there = context.ranks.leads and result_folder(context.plan).is_dir()
    if not _is_sharded(context):
        return there
    return context.ranks.told("there" if there else "") == "there"


def _results(
    built: Built, trained: Trained, *, both: bool
) -> tuple[Mapping[str, Tensor] | None, Mapping[str, Tensor]]:
    """The average, if there is one, and what the result holds: the trained weights where there is
    none, or where the plan saves `both`. Of a sharded model gathered, in rank 0."""
    average: Mapping[str, Tensor] | None = trained.ema.average if trained.ema else None
    shards, wanted = trained.shards, state(built)
    if shards is None:
        return average, wanted if average is None or both else average
    if average is not None:
        average = shards.gathered(average)
    return average, shards.gathered(wanted) if average is None or both else average


def _painter(context: Context, trained: Trained, trackers: Sequence[Tracker]) -> Painter | None:
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
        ema=trained.ema,
        trackers=trackers,
        events=context.events,
        stop=context.stop,
        clip=ClipScore(clip).score if clip else None,
        told={int(row["step"]) for row in metrics if CLIP_SCORE in row} if clip else set(),
    )


def _check_space(context: Context, trained: Trained) -> None:
    """A checkpoint that can't be written should be found before the steps that lead to it."""
    plan = context.plan
    count = sum(p.numel() for p in trained.parameters.values())
    weights = sum(p.nbytes for p in trained.parameters.values())
    needed = weights + saved_bytes(plan.optimizer.name, plan.precision.trained, count)
    if (rival := trained.rival) is not None:
        count = sum(p.numel() for p in rival.parameters.values())
        needed += sum(p.nbytes for p in rival.parameters.values())
        needed += saved_bytes(plan.optimizer.name, plan.precision.trained, count)
    if trained.ema is not None:
        needed += 4 * count
    folder.check_space(context.folder, needed)
