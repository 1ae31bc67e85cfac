"""Pictures that are held out, and trained all the same under another name.

A plan refuses one picture that two sources name. Copies of it are known by content alone, which is
read when the cache is filled.
"""

from __future__ import annotations

from collections.abc import Iterator

from compiler.data.manifest import Manifest
from compiler.data.scan import shown
from compiler.plan import Plan
from runtime.data.cache import Cache
from runtime.data.hashes import item_hashes
from runtime.data.packed import reading_order, spans
from runtime.events import Events

_NAMED = 3  # copies that are named


def warn_of_leaks(plan: Plan, manifest: Manifest, cache: Cache, events: Events) -> None:
    """Say which held-out pictures have the bytes of trained ones. Raises FileGone."""
    judged = manifest.held_out
    if judged is None:
        return
    held = {content: row for row, content in _contents(plan, judged, cache)}
    trained = {content: row for row, content in _contents(plan, manifest, cache) if content in held}
    copies = [(row, trained[content]) for content, row in held.items() if content in trained]
    if not copies:
        return
    pairs = [
        f"{shown(judged.name(row))} is {shown(manifest.name(other))}"
        for row, other in copies[:_NAMED]
    ]
    more = [f"and {len(copies) - _NAMED} more"] if len(copies) > _NAMED else []
    count = "1 held-out image is" if len(copies) == 1 else f"{len(copies)} held-out images are"
    events.message(
        f"{count} trained too, under another name, so that the evaluation loss says less than it "
        f"seems to; remove the copies: {', '.join([*pairs, *more])}",
        "warning",
    )


def _contents(plan: Plan, manifest: Manifest, cache: Cache) -> Iterator[tuple[int, bytes]]:
    """Rows with the hashes of their pictures, in the order in which they are read."""
    order = reading_order(manifest)
    for span in spans(len(order)):
        rows = order[span].tolist()
        items = [manifest.item(row) for row in rows]
        yield from zip(rows, item_hashes(cache, items, plan.workers), strict=True)
