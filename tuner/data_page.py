"""The page of `tuner data`: what the model will see, bucket by bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from math import floor, log2

from compiler.costs import Outlook
from compiler.data.manifest import Manifest
from compiler.data.scan import shown as spelt
from compiler.diagnostics import Diagnostic
from compiler.plan import Bucket, DataSource, Plan
from runtime.data.looks import Shown, shown, some_of
from tuner.formats import counted, number
from tuner.html import document, table

SHEETS = 40  # buckets with pictures; of the others the table tells
FORMS = 6  # of one picture's captions that are written out
OPEN = 8  # names that are not folded away

Left = tuple[str, Sequence[str], str]
"""A source, images that are left out of it, and why."""


def page(
    plan: Plan,
    manifest: Manifest,
    outlook: Outlook | None,
    warnings: Sequence[Diagnostic],
    most: int,
    left: Sequence[Left] = (),
) -> str:
    """The whole document, with at most `most` pictures of each bucket. What is `left` out is
    named."""
    body = "".join(
        (
            _header(plan, manifest),
            "<main>",
            _sources(plan),
            _left_out(plan, outlook, warnings, left),
            _sizes(manifest),
            _buckets(plan),
            *_sheets(plan, manifest, most),
            "</main>",
        )
    )
    return document(f"{plan.name} - tuner data", body, "report", "data")


def _header(plan: Plan, manifest: Manifest) -> str:
    steps = plan.steps
    facts = [
        ("Samples", f"{steps.samples_per_epoch:,}", "an epoch"),
        ("Images", f"{len(manifest):,}", "mirrored ones counted too"),
        ("Buckets", f"{len(plan.buckets):,}", "of one source and one size each"),
        ("Captions", f"{len(manifest.captions):,}", "that differ"),
    ]
    cells = "".join(
        f"<div><dt>{title}</dt><dd>{value} <small>{note}</small></dd></div>"
        for title, value, note in facts
    )
    return (
        f'<header><div class="title"><h1>Data of {escape(plan.name)}</h1></div>'
        f"<p>What the model sees in training: each picture cut and scaled as planned, with its "
        f'captions as they are encoded.</p><dl class="facts">{cells}</dl></header>'
    )


def _sources(plan: Plan) -> str:
    """Images, samples and what is held out, source by source."""
    whole = sum(bucket.samples for bucket in plan.buckets)
    rows = []
    for source in plan.sources:
        samples = sum(b.samples for b in plan.buckets if b.source == source.id)
        rows.append(
            (
                f"{escape(source.id)}<br><span class='soft small'>{_rules(source)}</span>",
                f"{source.images:,}",
                escape(source.repeats) if source.images else "-",
                f"{samples:,}",
                f"{samples / whole:.1%}",
                f"{source.held_out:,}" if source.held_out else "-",
                f"{source.skipped:,}" if source.skipped else "-",
            )
        )
    titles = (
        ("Source", ""),
        ("Images", "number"),
        ("Passes", "number"),
        ("Samples an epoch", "number"),
        ("Share", "number"),
        ("Held out", "number"),
        ("Skipped", "number"),
    )
    return f"<h2>Sources</h2>{table(titles, rows, 'sources')}{_stages(plan)}"


def _stages(plan: Plan) -> str:
    """Samples of each source in an epoch, where sources come and go."""
    every = plan.steps.stages
    if not every:
        return ""
    ends = [*(stage.first_epoch for stage in every[1:]), plan.steps.epochs]
    samples = Counter[str]()
    for bucket in plan.buckets:
        samples[bucket.source] += bucket.samples
    rows = [
        (
            f"{stage.first_epoch + 1}" + (f" to {end}" if end > stage.first_epoch + 1 else ""),
            *(f"{samples[s.id]:,}" if s.id in stage.sources else "-" for s in plan.sources),
            f"{stage.samples_per_epoch:,}",
            f"{stage.per_epoch:,}",
        )
        for stage, end in zip(every, ends, strict=True)
    ]
    titles = (
        ("Epochs", "tight"),
        *((escape(source.id), "number") for source in plan.sources),
        ("Samples an epoch", "number"),
        ("Steps an epoch", "number"),
    )
    return f"<h3>Who trains when</h3>{table(titles, rows)}"


def _rules(source: DataSource) -> str:
    """What else there is to know of a source."""
    words = [escape(spelt(source.path))]
    if source.regularisation:
        learned = ", and what the base predicts is learned" if source.target == "base" else ""
        words.append(f"class images, their loss counts {number(source.loss_weight)} times{learned}")
    if source.mask:
        whose = "transparency" if source.mask.kind == "alpha" else "files"
        words.append(f"masks from {whose}, the rest counts {number(source.mask.floor)}")
    if source.captions.dropout:
        words.append(f"no caption in {source.captions.dropout:.0%} of uses")
    return "; ".join(words)


def _left_out(
    plan: Plan, outlook: Outlook | None, warnings: Sequence[Diagnostic], left: Sequence[Left]
) -> str:
    """Everything that is not trained, and why."""
    rows = [
        (escape(source), f"{len(names):,}", f"{escape(spelt(why))}{_names(names)}")
        for source, names, why in left
    ]
    rows += [
        (escape(row.source), f"{row.count:,}", f"hidden: {escape(', '.join(row.names))}")
        for row in (outlook.hidden if outlook else ())
    ]
    rows += [
        (escape(source.id), f"{source.held_out:,}", "held out")
        for source in plan.sources
        if source.held_out
    ]
    said = [fault for fault in warnings if fault.path.startswith("data")]
    words = "".join(
        f'<details><summary class="warning">{escape(fault.message)}</summary>{_advice(fault)}'
        "</details>"
        for fault in said
    )
    if not rows and not words:
        return "<h2>Left out</h2><p class='soft'>Nothing: every image found is trained.</p>"
    titles = (("Source", ""), ("Images", "number"), ("Why", ""))
    return f"<h2>Left out</h2>{table(titles, rows) if rows else ''}{words}"


def _names(names: Sequence[str]) -> str:
    """All names, behind a fold where they are many."""
    listed = "<br>".join(escape(spelt(name)) for name in names)
    if len(names) <= OPEN:
        return f"<br><span class='soft small'>{listed}</span>"
    count = counted(len(names), "name")
    return f"<details><summary>{count}</summary><span class='soft small'>{listed}</span></details>"


def _advice(fault: Diagnostic) -> str:
    lines = [*fault.notes, *fault.help.splitlines()]
    listed = "<br>".join(escape(line) for line in lines)
    return f"<p class='small soft'>{listed}</p>" if lines else ""


def _sizes(manifest: Manifest) -> str:
    """How large the pictures are, by their shorter edge, in steps of half an octave."""
    pictures = {
        (manifest.path(row), sample.at): min(sample.width, sample.height)
        for row, sample in enumerate(manifest)
    }
    edges = list(pictures.values())
    bins = Counter(floor(2 * log2(edge)) for edge in edges)
    most = max(bins.values())
    rows = [
        (
            f"{2 ** (place / 2):.0f} to {2 ** ((place + 1) / 2):.0f}",
            f'<div class="bar measured" style="width:{100 * bins[place] / most:.1f}%"></div>'
            if bins[place]
            else "",
            f"{bins[place]:,}",
        )
        for place in range(min(bins), max(bins) + 1)
    ]
    titles = (("Shorter edge", "tight"), ("", "bars"), ("Images", "number"))
    words = f"{min(edges):,} to {max(edges):,} pixels, before they are scaled."
    return f"<h2>Sizes</h2><p class='soft'>{words}</p>{table(titles, rows)}"


def _buckets(plan: Plan) -> str:
    rows = [
        (
            escape(bucket.source),
            f"{bucket.width} x {bucket.height}",
            f"{bucket.images:,}",
            f"{bucket.samples:,}",
            f"{bucket.batches:,} of {bucket.batch_size}",
        )
        for bucket in plan.buckets
    ]
    titles = (
        ("Source", ""),
        ("Bucket", "tight"),
        ("Images", "number"),
        ("Samples an epoch", "number"),
        ("Batches", "number"),
    )
    return f"<h2>Buckets</h2>{table(titles, rows)}"


def _sheets(plan: Plan, manifest: Manifest, most: int) -> Iterator[str]:
    """A contact sheet for each of the largest buckets."""
    pairs = list(zip(manifest.buckets, plan.buckets, strict=True))
    largest = sorted(range(len(pairs)), key=lambda at: -pairs[at][1].images)[:SHEETS]
    chosen = {at: some_of(pairs[at][0].samples, most, plan.seed) for at in sorted(largest)}
    pictures = shown(plan, manifest, [row for rows in chosen.values() for row in rows])
    for at, rows in chosen.items():
        bucket = pairs[at][1]
        figures = [_figure(plan, manifest, next(pictures)) for _ in rows]
        yield f'{_title(bucket, len(rows))}<div class="sheet">{"".join(figures)}</div>'
    if len(pairs) > SHEETS:
        yield f"<p class='soft'>{len(pairs) - SHEETS:,} smaller buckets are not shown.</p>"


def _title(bucket: Bucket, count: int) -> str:
    some = f"{count} of " if count < bucket.images else ""
    return (
        f'<h3 class="bucket">{escape(bucket.source)} {bucket.width} x {bucket.height}'
        f'<span class="soft small">{some}{counted(bucket.images, "image")}</span></h3>'
    )


def _figure(plan: Plan, manifest: Manifest, picture: Shown) -> str:
    sample = manifest[picture.row]
    name = escape(spelt(manifest.name(picture.row)), quote=True)
    if picture.address:
        placed = sample.placement
        image = (
            f'<img src="{picture.address}" alt="{name}" loading="lazy" '
            f'width="{placed.width}" height="{placed.height}">'
        )
    else:
        image = f'<div class="broken">{escape(picture.why)}</div>'
    facts = f"{sample.width} x {sample.height}"
    if picture.share is not None:
        facts += f", mask shows {picture.share:.0%}"
    return (
        f"<figure>{image}<figcaption>{_captions(sample.captions)}"
        f'<span class="name">{name}; {facts}</span></figcaption></figure>'
    )


def _captions(captions: Sequence[str]) -> str:
    """The first caption, and some of the others behind a fold."""
    said = [escape(text) if text else "<i>no caption</i>" for text in dict.fromkeys(captions)]
    if len(said) == 1:
        return said[0]
    listed = "".join(f"<li>{text}</li>" for text in said[1:FORMS])
    more = f"<li>and {len(said) - FORMS:,} more</li>" if len(said) > FORMS else ""
    return (
        f"{said[0]}<details><summary>{counted(len(said) - 1, 'other form')}</summary>"
        f"<ul>{listed}{more}</ul></details>"
    )
