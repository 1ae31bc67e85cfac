"""A contact sheet of what a run was trained on, a few pictures of each bucket."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from compiler.data.manifest import Manifest, ManifestDamaged
from compiler.data.scan import shown as spelt
from compiler.plan import Plan
from tuner.formats import counted
from tuner.run_data import RunData

MANIFEST = "manifest.jsonl"  # in the run folder: the list of samples
BUCKETS = 8  # the largest ones
EACH = 6  # pictures of one bucket


def contact_sheet(run: RunData) -> str:
    """Pictures by bucket, cut as the model saw them; "" where they are not there any more."""
    if run.plan is None:
        return ""
    try:
        manifest = Manifest.load(run.folder / MANIFEST)
    except (OSError, ManifestDamaged):
        return ""
    if manifest.digest != run.plan.manifest:
        return ""
    blocks = list(_blocks(run.plan, manifest))
    return f"<div class='sheets'>{''.join(blocks)}</div>" if blocks else ""


def _blocks(plan: Plan, manifest: Manifest) -> Iterator[str]:
    from runtime.data.looks import shown, some_of

    members = sorted(manifest.buckets, key=lambda bucket: -len(bucket.samples))[:BUCKETS]
    chosen = [some_of(bucket.samples, EACH, plan.seed) for bucket in members]
    pictures = shown(plan, manifest, [row for rows in chosen for row in rows])
    for bucket, rows in zip(members, chosen, strict=True):
        images = [
            f'<img src="{picture.address}" loading="lazy" '
            f'alt="{escape(spelt(manifest.name(picture.row)), quote=True)}">'
            for picture in (next(pictures) for _ in rows)
            if picture.address
        ]
        if images:
            source = escape(plan.sources[bucket.source].id)
            title = f"{source} {bucket.width} x {bucket.height}"
            count = counted(len(bucket.samples), "image")
            yield (
                f"<figure><div class='contact'>{''.join(images)}</div>"
                f"<figcaption>{title} &middot; {count}</figcaption></figure>"
            )
