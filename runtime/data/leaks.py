"""Pictures that are held out, and trained all the same under another name.

A plan sees one picture that two sources or rows name. Copies of it are known by content alone,
which is read when the cache is filled, and the plan's steps can't change any more then: copies are
trained, and none of them is judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from compiler.data.manifest import Manifest
from compiler.data.scan import shown
from compiler.plan import Plan
from runtime.data.cache import Cache
from runtime.data.hashes import item_hashes
from runtime.data.packed import Rows, reading_order, spans
from runtime.errors import RunFailed
from runtime.events import Events

_NAMED = 3  # copies that are named


class NothingToJudge(RunFailed):
    """All that is held out is trained too."""


def copies(plan: Plan, manifest: Manifest, cache: Cache) -> Mapping[int, int]:
    """Rows of `manifest.held_out` that have the bytes of a trained picture that lies elsewhere, and
    the last such row of `manifest`. Raises FileGone."""
    judged = manifest.held_out
    if judged is None:
        return {}
    lengths = np.unique(_lengths(judged))
    alike = np.flatnonzero(np.isin(_lengths(manifest), lengths))
    if not len(alike):
        return {}
    held: dict[bytes, list[int]] = {}
    for row, content in _contents(plan, judged, cache, np.arange(len(judged))):
        held.setdefault(content, []).append(row)
    found: dict[int, int] = {}
    for row, content in _contents(plan, manifest, cache, alike):
        for out in held.get(content, ()):
            if judged.item(out) != manifest.item(row):  # or the plan itself says it of one picture
                found[out] = max(row, found.get(out, row))
    return dict(sorted(found.items()))


def warn_of_leaks(plan: Plan, manifest: Manifest, cache: Cache, events: Events) -> None:
    """Say which held-out pictures have the bytes of trained ones. Raises FileGone, and
    NothingToJudge where no others are held out."""
    judged, found = manifest.held_out, copies(plan, manifest, cache)
    if judged is None or not found:
        return
    pairs = [
        f"{shown(judged.name(row))} is {shown(manifest.name(other))}"
        for row, other in list(found.items())[:_NAMED]
    ]
    more = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
    named = ", ".join([*pairs, *more])
    if len(found) == len(judged):
        raise NothingToJudge(
            f"each of the {len(judged)} held-out images is trained too, under another name: "
            "nothing is left to judge",
            help=f"remove the copies: {named}",
        )
    one = len(found) == 1
    events.message(
        f"{'1 held-out image is' if one else f'{len(found)} held-out images are'} trained too, "
        f"under another name, and {'is' if one else 'are'} left out of the evaluation loss: "
        f"{named}",
        "warning",
    )


def _lengths(manifest: Manifest) -> Rows:
    """The bytes of each row's picture: copies have as many."""
    return np.frombuffer(manifest.lengths(), np.uint64).astype(np.int64)


def _contents(
    plan: Plan, manifest: Manifest, cache: Cache, rows: Rows
) -> Iterator[tuple[int, bytes]]:
    """Some rows with the hashes of their pictures, in the order in which they are read."""
    order = reading_order(manifest, rows)
    for span in spans(len(order)):
        numbers = order[span].tolist()
        items = [manifest.item(row) for row in numbers]
        yield from zip(numbers, item_hashes(cache, items, plan.workers), strict=True)
