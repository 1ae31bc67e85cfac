"""The updates of a run, and what is done between them: saving, drawing, measuring."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial

from compiler.optimizers import saved_bytes
from runtime import checkpoints, files, folder, sharded_saving, zero_saving
from runtime.build import Built, state
from runtime.checkpoints import Snapshot
from runtime.context import Context, announce, as_leader
from runtime.data.feed import Feed, Window
from runtime.errors import RunFailed
from runtime.evaluate import Judge
from runtime.host_copy import HostCopy
from runtime.loop import Actions, Trained, due, train
from runtime.machine import versions
from runtime.met import noted
from runtime.ranks import ALONE
from runtime.resident import resident
from runtime.saving import Saver, Write, prune
from runtime.seeing import draw_samples, measure_loss
from runtime.sharded import Shards
from runtime.track import METRICS, Tracker, rows
from runtime.validate import Painter
from runtime.zero import Zero

THERE = "there"  # the word of rank 0 for a checkpoint that is, or is about to be


def train_from(
    context: Context,
    built: Built,
    trained: Trained,
    painter: Painter | None,
    judge: Judge | None,
    trackers: Sequence[Tracker],
    done: int,
) -> int:
    """Train from `done` updates on; returns those reached."""
    shards = trained.shards
    channel = sharded_saving.Channel() if isinstance(shards, Shards) else None
    with closing(HostCopy(context.device)) as room, _saver(context, channel) as saver:

        def saved(step: int, take: Callable[[], Write]) -> None:
            with context.clock.phase("save"):
                context.events.phase("save", 0, "")
                saver.save(step, take)
            announce(context, step)

        def copied(step: int, epoch: int) -> Write:
            gauge = context.clock.gauge
            there = resident(context.plan, trained) if gauge.wants("save") else {}
            with gauge.reading("save", 0, there, on_host=True):
                return _copied(context, built, trained, room, step, epoch)

        def led(step: int, epoch: int) -> None:
            if not saver.has(step):
                saved(step, lambda: copied(step, epoch))

        def save(step: int, epoch: int) -> None:
            if shards is None:
                context.ranks.led(lambda: led(step, epoch))
            elif context.ranks.told(THERE if context.ranks.leads and saver.has(step) else ""):
                return
            elif channel is not None and isinstance(shards, Shards):
                head = _head(context, step, epoch)
                given = (shards, trained.optimizer, trained.ema, context.ranks, room, channel)
                saved(step, lambda: sharded_saving.taken(saver.root, head, *given))
            else:
                _save_zero(context, trained, step, epoch)

        def draw(step: int) -> None:
            as_leader(context, trained, lambda: draw_samples(context, trained, painter, step))

        def evaluate(step: int) -> None:
            as_leader(
                context, trained, lambda: measure_loss(context, trained, judge, trackers, step)
            )

        actions = Actions(checkpoint=save, validate=draw, evaluate=evaluate, check=saver.check)
        return _updated(context, trained, trackers, actions, done)


def _updated(
    context: Context, trained: Trained, trackers: Sequence[Tracker], actions: Actions, done: int
) -> int:
    """Train from `done` updates on, with `actions` between them; returns those reached."""
    plan, ranks = context.plan, context.ranks
    with context.stop.patient():
        if due(done, plan.validation.every) if done else plan.validation.at_start:
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
            announce(context, done)
            return train(
                plan,
                trained,
                noted(windows, plan, trained, context.clock.gauge),  # which keeps none
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


def _check_space(context: Context, trained: Trained) -> None:
    """A checkpoint that can't be written should be found before the steps that lead to it."""
    plan = context.plan
    count = sum(p.numel() for p in trained.parameters.values())
    weights = sum(p.nbytes for p in trained.parameters.values())
    needed = weights + saved_bytes(plan.optimizer.name, plan.precision.trained, count)
    if trained.ema is not None:
        needed += 4 * count
    if (rival := trained.rival) is not None:
        count = sum(p.numel() for p in rival.parameters.values())
        needed += sum(p.nbytes for p in rival.parameters.values())
        needed += saved_bytes(plan.optimizer.name, plan.precision.trained, count)
    folder.check_space(context.folder, needed)


@contextmanager
def _saver(context: Context, channel: sharded_saving.Channel | None) -> Iterator[Saver]:
    """What saves, all ranks together if they have a channel; nothing is under way any more when the
    block has ended."""
    root, rules = context.folder / "checkpoints", context.plan.checkpoints
    metrics = context.folder / METRICS
    ranks = ALONE if channel is None else context.ranks
    skips = context.plan.guard.skip > 0
    saver = Saver(root, rules, metrics, context.publisher.checkpoint, ranks, skips=skips)
    if context.ranks.leads:
        prune(
            root, rules, metrics, skips=skips
        )  # a run that was killed may have saved and not deleted
    try:
        yield saver
    except BaseException:
        try:
            saver.finish()
        except (RunFailed, RuntimeError, MemoryError, OSError) as error:  # the first one is raised
            why = str(error).strip() or type(error).__name__
            context.events.message(f"the last save failed: {why}", "error")
        raise
    saver.finish()


def _copied(
    context: Context, built: Built, trained: Trained, room: HostCopy, step: int, epoch: int
) -> Write:
    """Copy the run's state after `step` updates to host memory; what is returned writes it."""
    rival = trained.rival
    tree = (
        state(built),
        trained.optimizer.state_dict(),
        trained.ema and trained.ema.average,
        rival and rival.state,
        rival and rival.optimizer.state_dict(),
    )
    weights, optimizer, average, rivals, rivals_optimizer = room.take(tree)
    snapshot = Snapshot(
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
    return partial(checkpoints.save, context.folder / "checkpoints", snapshot)


def _head(context: Context, step: int, epoch: int) -> Snapshot:
    """What `state.json` is to say of a checkpoint whose tensors lie in parts."""
    return Snapshot(
        step=step,
        epoch=epoch,
        plan=context.plan.digest,
        weights={},
        optimizer={},
        ema=None,
        versions=versions(),
    )


def _save_zero(context: Context, trained: Trained, step: int, epoch: int) -> None:
    """Save what DeepSpeed holds, all ranks together, before training goes on."""
    assert isinstance(trained.shards, Zero)
    root, metrics = context.folder / "checkpoints", context.folder / METRICS
    head = _head(context, step, epoch)
    with context.clock.phase("save"):
        context.events.phase("save", 0, "")
        if context.ranks.leads and metrics.exists():
            files.sync(metrics)
        given = (trained.shards, trained.optimizer, trained.ema, context.ranks)
        saved = zero_saving.save(root, head, *given)
        if context.ranks.leads:
            context.publisher.checkpoint(saved, step)
            skips = context.plan.guard.skip > 0
            prune(root, context.plan.checkpoints, metrics, skips=skips)
    announce(context, step)
