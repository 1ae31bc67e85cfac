"""Sources that come and go: the stages of a run, in each of which the same sources train.

A source joins and leaves between two epochs: where its recipe names another moment, at the next
epoch that begins. An epoch is a pass over the sources that are there, so epochs of different stages
differ in length. All counting is exact: what an epoch holds is counted by its buckets, stage by
stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

from attrs import frozen

from compiler.data.counts import steps_per_epoch
from compiler.plan import Bucket, DataSource, Stage, Steps
from compiler.units import Interval


@frozen(kw_only=True)
class Span:
    """When a source trains: from `first` on (None: from the start) until `until` (None: to the
    end). Both in steps or epochs done."""

    first: Interval | None
    until: Interval | None


class Gap(ValueError):
    """At `epoch` (from 0) no source trains, and the run goes on."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"no source trains in epoch {epoch + 1}")
        self.epoch = epoch


def stages_of(
    buckets: Sequence[Bucket],
    spans: Mapping[str, Span],
    window: int,
    *,
    epochs: int | None,
    total: int | None,
) -> tuple[Stage, ...]:
    """The stages of a run of `epochs` epochs or `total` steps; `spans` by id of source, `window`
    the batches of a step. Raises Gap."""
    found: list[Stage] = []
    epoch = step = 0
    while (epochs is None or epoch < epochs) and (total is None or step < total):
        names = [name for name, span in spans.items() if _trains(span, epoch, step)]
        if not names:
            raise Gap(epoch)
        stage = _stage(buckets, names, window, epoch, step)
        found.append(stage)
        following = [
            _epoch_of(moment, stage)
            for span in spans.values()
            for moment in (span.first, span.until)
            if moment is not None and not _reached(moment, epoch, step)
        ]
        if not following:
            break
        step += (min(following) - epoch) * stage.per_epoch
        epoch = min(following)
    return tuple(found)


def last_step(stage: Stage, epochs: int) -> int:
    """Steps of a run of `epochs` epochs of which `stage` is the last."""
    return stage.first_step + (epochs - stage.first_epoch) * stage.per_epoch


def epochs_begun(stage: Stage, total: int) -> int:
    """Epochs that a run of `total` steps begins, of which `stage` is the last."""
    return stage.first_epoch - (stage.first_step - total) // stage.per_epoch


def stages(steps: Steps, sources: Sequence[DataSource]) -> tuple[Stage, ...]:
    """The stages of a run; without any in the plan the one in which all sources train."""
    return steps.stages or (
        Stage(
            first_epoch=0,
            first_step=0,
            per_epoch=steps.per_epoch,
            batches_per_epoch=steps.batches_per_epoch,
            samples_per_epoch=steps.samples_per_epoch,
            sources=tuple(source.id for source in sources),
        ),
    )


def steps_in(every: Sequence[Stage], total: int) -> list[int]:
    """How many of a run's steps each stage has."""
    ends = [*(stage.first_step for stage in every[1:]), total]
    return [end - stage.first_step for stage, end in zip(every, ends, strict=True)]


def _stage(
    buckets: Sequence[Bucket], names: Sequence[str], window: int, epoch: int, step: int
) -> Stage:
    there = [bucket for bucket in buckets if bucket.source in names]
    batches = sum(bucket.batches for bucket in there)
    return Stage(
        first_epoch=epoch,
        first_step=step,
        per_epoch=steps_per_epoch(batches, 1, window),
        batches_per_epoch=batches,
        samples_per_epoch=sum(bucket.samples for bucket in there),
        sources=tuple(names),
    )


def _trains(span: Span, epoch: int, step: int) -> bool:
    begun = span.first is None or _reached(span.first, epoch, step)
    return begun and not (span.until is not None and _reached(span.until, epoch, step))


def _reached(moment: Interval, epoch: int, step: int) -> bool:
    if moment.epochs is not None:
        return epoch >= moment.epochs
    return step >= (moment.steps or 0)


def _epoch_of(moment: Interval, stage: Stage) -> int:
    """The first epoch that begins at `moment` or later, if epochs go on as in `stage`."""
    if moment.epochs is not None:
        return ceil(moment.epochs)
    return stage.first_epoch + ceil(((moment.steps or 0) - stage.first_step) / stage.per_epoch)
