"""Buckets to batches to steps, exactly. A step is one optimizer update."""

from __future__ import annotations

from math import ceil

from compiler.data.counts import bucket_rows, samples_per_epoch, steps_per_epoch
from compiler.draft import Draft
from compiler.plan import Steps


def resolve_batches(draft: Draft) -> None:
    """Fill in `draft.buckets` and `draft.steps`."""
    if not _one_length(draft) or draft.manifest is None:
        return
    train = draft.recipe.train
    draft.decide(("train", "batch_size"), train.batch_size)
    draft.decide(("train", "accumulate"), train.accumulate)
    if not _batch_fits(draft):
        return
    draft.buckets = bucket_rows(draft.manifest, draft.sources, train.batch_size)
    batches = sum(bucket.batches for bucket in draft.buckets)
    ranks = 1
    per_epoch = steps_per_epoch(batches, ranks, train.accumulate)
    total = train.steps if train.steps is not None else (train.epochs or 0) * per_epoch
    draft.steps = Steps(
        total=total,
        per_epoch=per_epoch,
        epochs=-(-total // per_epoch),
        batches_per_epoch=batches,
        samples_per_epoch=sum(bucket.samples for bucket in draft.buckets),
        accumulate=train.accumulate,
        ranks=ranks,
    )
    key = "steps" if train.steps is not None else "epochs"
    draft.decide(("train", key), train.steps if key == "steps" else train.epochs)
    _small_buckets(draft)


def _one_length(draft: Draft) -> bool:
    train = draft.recipe.train
    if train.epochs is not None and train.steps is not None:
        draft.error(
            "conflict",
            ("train", "steps"),
            "both `epochs` and `steps` are given",
            label=f"`epochs = {train.epochs}` is given too",
            help="leave one of them out",
            of="key",
        )
        return False
    if train.epochs is None and train.steps is None:
        draft.error(
            "missing-key",
            ("train",),
            "[train] needs `epochs` or `steps`",
            help="epochs = 10",
            of="table",
        )
        return False
    return True


def _batch_fits(draft: Draft) -> bool:
    """A batch larger than a whole source is a mistake; a short batch in a bucket is not."""
    size = draft.recipe.train.batch_size
    fits = True
    for number, source in enumerate(draft.sources):
        samples = samples_per_epoch(source.images, source.repeats)
        if size > samples:
            fits = False
            draft.error(
                "batch-too-large",
                ("train", "batch_size") if draft.given(("train", "batch_size")) else ("train",),
                f"a batch of {size} is larger than source `{source.id}`: "
                f"{source.images} image{'s' * (source.images != 1)} x {source.repeats} = "
                f"{samples} samples an epoch",
                help=f"batch_size = {samples}, or repeats = {ceil(size / source.images)} "
                f"in [[data.source]] entry {number + 1}",
            )
    return fits


def _small_buckets(draft: Draft) -> None:
    short = [bucket for bucket in draft.buckets if bucket.samples < bucket.batch_size]
    if short:
        sizes = ", ".join(f"{bucket.width}x{bucket.height}" for bucket in short[:4])
        more = f" and {len(short) - 4} more" if len(short) > 4 else ""
        draft.warn(
            "small-buckets",
            ("data", "source"),
            f"{len(short)} of {len(draft.buckets)} buckets never fill a batch ({sizes}{more})",
            help="they are trained short and weighted by their samples; nothing is dropped",
        )
