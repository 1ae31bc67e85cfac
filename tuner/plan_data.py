"""The part of a plan that is about data: sources, buckets, and how steps follow from them."""

from __future__ import annotations

from fractions import Fraction

from compiler.costs import Outlook
from compiler.plan import Bucket, DataSource, Geometry, Plan
from tuner.formats import counted, number
from tuner.layout import columns, section, wrapped

MAX_BUCKETS = 5  # rows of buckets that all sources together get without -v, but at least one each


def data_lines(plan: Plan, verbose: bool, outlook: Outlook | None) -> list[str]:
    """The section on data: sources, buckets, and the sum from images to steps."""
    skipped = sum(source.skipped for source in plan.sources)
    words = f"{counted(images_of(plan), 'image')} in {counted(len(plan.buckets), 'bucket')}"
    total = f", {skipped:,} skipped" if skipped and len(plan.sources) > 1 else ""
    lines = section("data", words + total)
    most = len(plan.buckets) if verbose else max(1, MAX_BUCKETS // len(plan.sources))
    for source in plan.sources:
        told = [f"{counted(source.files, 'file')}, {source.kind}"] if source.files else []
        told += [_skipped_words(source, outlook)] if source.skipped else []
        told += [f"{source.held_out:,} held out"] if source.held_out else []
        told += _hidden_words(source, outlook)
        note = f" ({'; '.join(told)})" if told else ""
        lines += wrapped(f"{source.id}: {source.path}{note}", "  ", "    ")
        if verbose:
            lines += _source_details(plan, source.id)
        buckets = [bucket for bucket in plan.buckets if bucket.source == source.id]
        shown = buckets[: most if len(buckets) != most + 1 else most + 1]
        rows = [(f"{b.width}x{b.height}", _bucket_words(b, source.repeats)) for b in shown]
        lines += columns(rows, indent=4)
        if len(buckets) > len(shown):
            lines.append(f"    and {counted(len(buckets) - len(shown), 'bucket')} more (-v)")
    lines += wrapped(arithmetic(plan), "  = ", "    ")
    return lines + _stages(plan)


def _stages(plan: Plan) -> list[str]:
    """Which sources train when, where they come and go."""
    every, steps = plan.steps.stages, plan.steps
    if not every:
        return []
    ends = [*(stage.first_epoch for stage in every[1:]), steps.epochs]
    rows = [
        (
            f"epoch {stage.first_epoch + 1}"
            + (f" to {end}" if end > stage.first_epoch + 1 else "")
            + f", from step {stage.first_step + 1:,}",
            f"{', '.join(stage.sources)}: {counted(stage.samples_per_epoch, 'sample')} in "
            f"{counted(stage.per_epoch, 'step')} an epoch",
        )
        for stage, end in zip(every, ends, strict=True)
    ]
    return columns(rows, indent=4)


def _skipped_words(source: DataSource, outlook: Outlook | None) -> str:
    """How many images are left out, and why if that is known."""
    rows = [row for row in (outlook.skipped if outlook else ()) if row.source == source.id]
    why = ", ".join(f"{row.images:,}: {row.why}" for row in rows)
    return f"{source.skipped:,} skipped" + (f"; {why}" if why else "")


def _hidden_words(source: DataSource, outlook: Outlook | None) -> list[str]:
    """Hidden files, which are no data: named, so that nobody looks for them in vain."""
    own = source.id.partition("@")[0], source.id  # several resolutions are named behind an @
    rows = [row for row in (outlook.hidden if outlook else ()) if row.source in own]
    return [
        f"{row.count:,} hidden left alone: {', '.join(row.names)}"
        + (", ..." if row.count > len(row.names) else "")
        for row in rows
    ]


def _source_details(plan: Plan, source_id: str) -> list[str]:
    source = next(source for source in plan.sources if source.id == source_id)
    rows = [_shape_words(source.geometry), _caption_words(source)]
    if source.mask:
        rest = f"the rest counts {number(source.mask.floor)}" if source.mask.floor else "no rest"
        whose = "transparency" if source.mask.kind == "alpha" else source.mask.folder
        rows.append(f"masks from {whose}, {rest}")
    if source.regularisation:
        learned = ", and what the base predicts is learned" if source.target == "base" else ""
        rows.append(f"class images: their loss counts {number(source.loss_weight)} times{learned}")
    return [line for row in rows for line in wrapped(row, "    ", "      ")]


def _shape_words(shape: Geometry) -> str:
    listed = f" of {', '.join(shape.buckets)}" if shape.buckets else ""
    words = (
        f"resolution {number(shape.resolution)} {shape.resolution_type}, {shape.aspect}{listed}, "
        f"{shape.crop} crop, edges in multiples of {shape.multiple}"
    )
    if shape.resize == "none":
        words += ", cut at their own size"
        words += f" (shorter edge at most {shape.max_size})" if shape.max_size else ""
    return words + (", each image mirrored too" if shape.flip else "")


def _caption_words(source: DataSource) -> str:
    captions = source.captions
    named = f" `{captions.prompt}`" if captions.prompt else ""
    words = f"captions from {captions.kind}{named}, dropout {number(captions.dropout)}"
    changes = ["shuffled"] * captions.shuffle
    share = number(100 * captions.tag_dropout)
    changes += [f"{share}% of tags dropped"] if captions.tag_dropout else []
    if changes:
        words += f", {' and '.join(changes)} in {captions.variants} forms"
    if source.fallbacks:
        words += f", {counted(source.fallbacks, 'image')} without one told by `{captions.missing}`"
    return f"{words}; {counted(source.texts, 'text')} to encode"


def _bucket_words(bucket: Bucket, repeats: str) -> str:
    product = bucket.images * Fraction(repeats)
    sign = "=" if product == bucket.samples else "->"
    short = bucket.samples - (bucket.batches - 1) * bucket.batch_size
    return (
        f"{counted(bucket.images, 'image')} x {repeats} {sign} "
        f"{counted(bucket.samples, 'sample')} / {bucket.batch_size} = "
        f"{counted(bucket.batches, 'batch', 'batches')}"
        + (f", last of {short}" if short < bucket.batch_size else "")
    )


def arithmetic(plan: Plan) -> str:
    """From images to steps, as a sum that can be checked by hand."""
    steps = plan.steps
    window = steps.ranks * steps.accumulate
    words = f"{counted(steps.samples_per_epoch, 'sample')} in "
    words += counted(steps.batches_per_epoch, "batch", "batches")
    if window > 1:
        parts = [f"{steps.ranks} ranks"] * (steps.ranks > 1)
        parts += [f"{steps.accumulate} accumulated"] * (steps.accumulate > 1)
        divisor = " x ".join(parts)
        words += f" / ({divisor})" if len(parts) > 1 else f" / {divisor}"
    words += f" = {counted(steps.per_epoch, 'step')} an epoch"
    last = steps.batches_per_epoch - (steps.per_epoch - 1) * window
    if steps.ranks > 1 and last < window:
        words += f", the last of {counted(last, 'batch', 'batches')}"
    if steps.stages:
        return f"{words} at first; {counted(steps.total, 'step')} in all"
    whole, rest = divmod(steps.total, max(steps.per_epoch, 1))
    if rest == 0:
        return f"{words} x {counted(whole, 'epoch')} = {counted(steps.total, 'step')}"
    return f"{words}; {counted(steps.total, 'step')} = {counted(whole, 'epoch')} + {rest:,}"


def images_of(plan: Plan) -> int:
    """How many images all sources have."""
    return sum(source.images for source in plan.sources)
