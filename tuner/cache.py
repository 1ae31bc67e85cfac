"""`tuner cache`: what is cached, whether it is whole, and what may go.

Copies of what lies elsewhere, and of compressed tars, are in the user's cache folder, whatever
folder a recipe has for its cache; they are told and removed with what is cached there.
"""

from __future__ import annotations

import json as json_module
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import wraps
from pathlib import Path
from sqlite3 import OperationalError
from typing import TYPE_CHECKING, ParamSpec

from compiler.data.scan import shown
from compiler.units import ByteSize, Duration, UnitError
from tuner.exits import DONE, FAILED, REFUSED
from tuner.formats import counted, duration, size
from tuner.layout import columns
from tuner.screen import err, out

if TYPE_CHECKING:
    from runtime.data.copies import Copy
    from runtime.data.keep import Kept, Shard
    from runtime.data.store import Store


P = ParamSpec("P")


def _explained(verb: Callable[P, int]) -> Callable[P, int]:
    """The verb, which says why where the cache can't be read or written."""

    @wraps(verb)
    def explained(*args: P.args, **kwargs: P.kwargs) -> int:
        from runtime.errors import RunFailed

        try:
            return verb(*args, **kwargs)
        except RunFailed as error:
            err(f"error: {error.message}\nhelp: {error.help}")
        except (OSError, OperationalError) as error:
            err(f"error: the cache can't be read: {error}")
        return FAILED

    return explained


@_explained
def list_cache(folder: Path | None, *, as_json: bool) -> int:
    """What there is, how old it is, and which run uses how much of it."""
    from runtime.data.keep import shards

    with closing(_store(folder)) as store:
        every = shards(store)
        where = store.path.parent
    copied = _copies(folder)
    if as_json:
        out(json_module.dumps(_object(where, every, copied), indent=2))
        return DONE
    lines = _lines(where, every) if every else [f"nothing is cached in {where}"]
    out("\n".join([*lines, *_copy_lines(copied)]))
    return DONE


@_explained
def verify_cache(folder: Path | None) -> int:
    """Read all of it and name what is damaged; 1 if there is anything."""
    from runtime.data.keep import damaged, shards

    with closing(_store(folder)) as store:
        every, names = shards(store), damaged(store)
    if names:
        lines = "\n".join(f"  {name}" for name in names)
        err(
            f"error: {len(names)} of {counted(len(every), 'shard')} in {store.path.parent} are "
            f"damaged or gone:\n{lines}\nhelp: delete these files; what they held is made anew"
        )
        return FAILED
    out(f"{counted(len(every), 'shard')}, {_bytes(every)}: all as written")
    return DONE


@_explained
def prune_cache(folder: Path | None, *, older: str, unused: bool, most: str, really: bool) -> int:
    """Remove what the person names; without `really`, only say what would go."""
    from runtime.data import copies
    from runtime.data.keep import disposable, remove, shards, sweep

    try:
        age = Duration.parse(older).seconds if older else None
        limit = int(ByteSize.parse(most)) if most else None
    except UnitError as error:
        return _refused(error.message, error.advice)
    if age is None and limit is None and not unused:
        return _refused(
            "nothing says what may go", 'say --older "30 d", --unused or --size "20 GiB"'
        )
    with closing(_store(folder)) as store:
        now = time.time()
        every, copied = shards(store), _copies(folder)
        both: list[Shard | Copy] = [*every, *copied]
        chosen = disposable(both, now, older=age, unused=unused, size=limit)
        gone = [each for each in chosen if not isinstance(each, copies.Copy)]
        lost = [each for each in chosen if isinstance(each, copies.Copy)]
        left: list[str] = []
        if really:
            gone = remove(store, gone, now) if gone else []
            copies.remove(lost)
            left = sweep(store)
    words = f"{counted(len(gone), 'shard')} of {len(every)}, {_bytes(gone)} of {_bytes(every)}"
    if copied:
        words += f"; {_copy_words(lost)} of {_copy_words(copied)}"
    words += f", and {counted(len(left), 'lost file')}" if left else ""
    out(f"removed {words}" if really else f"would remove {words}; --yes does it")
    if kept := [each for each in both if any(use.working for use in each.uses)]:
        runs = sorted({use.run for each in kept for use in each.uses if use.working})
        out(f"{_bytes(kept)} can't go now, being used by {', '.join(runs)}")
    return DONE


def _store(folder: Path | None) -> Store:
    from compiler.home import default_cache
    from runtime.data.store import INDEX, Store

    return Store((folder or default_cache()) / INDEX)


def _refused(message: str, help: str) -> int:
    err(f"error: {message}" + (f"\nhelp: {help}" if help else ""))
    return REFUSED


def _copies(folder: Path | None) -> list[Copy]:
    """What was copied; none of it lies in a `folder` that is named."""
    from compiler.home import default_cache
    from runtime.data.copies import copies

    return copies(default_cache()) if folder is None else []


_KINDS = {"source": "source", "image": "image", "unpacked": "unpacked tar"}


def _copy_words(copied: Sequence[Copy]) -> str:
    return f"{counted(len(copied), 'copy', 'copies')}, {_bytes(copied)}"


def _copy_lines(copied: Sequence[Copy]) -> list[str]:
    if not copied:
        return []
    now = time.time()
    lines = [f"copied: {_copy_words(copied)}"]
    rows = [
        (_bytes([each]), f"{shown(each.name)}, {_used_by(each)}, last {_ago(now, each.last)} ago")
        for each in copied
        if each.kind == "source"
    ]
    for kind, name in _KINDS.items():
        mine = [each for each in copied if each.kind == kind]
        if mine and kind != "source":
            unused = sum(not each.uses for each in mine)
            rows.append((_bytes(mine), f"{counted(len(mine), name)}, {unused} used by no run"))
    return [*lines, *columns(rows)]


def _used_by(copy: Copy) -> str:
    runs = sorted(use.run for use in copy.uses)
    return f"used by {', '.join(runs)}" if runs else "used by no run"


def _ago(now: float, moment: float) -> str:
    return duration(max(0.0, now - moment))


def _bytes(every: Sequence[Kept]) -> str:
    return size(sum(shard.bytes for shard in every))


def _by_run(every: Sequence[Shard]) -> dict[str, list[Shard]]:
    """The shards that each run reads; "" for those that none does."""
    found: dict[str, list[Shard]] = {}
    for shard in every:
        for run in [use.run for use in shard.uses] or [""]:
            found.setdefault(run, []).append(shard)
    return found


def _lines(where: Path, every: Sequence[Shard]) -> list[str]:
    now = time.time()
    entries = sum(shard.entries for shard in every)
    words = (
        f"{_bytes(every)} in {counted(len(every), 'shard')}, {counted(entries, 'entry', 'entries')}"
    )
    oldest = duration(max(0.0, now - every[0].written))
    newest = duration(max(0.0, now - every[-1].written))
    rows = [
        (
            _bytes(mine),
            f"{run or 'used by no run'}, last {duration(max(0.0, now - _last(run, mine)))} ago",
        )
        for run, mine in sorted(_by_run(every).items())
    ]
    return [f"{where}", f"  {words}; written {oldest} to {newest} ago", *columns(rows)]


def _last(run: str, mine: Sequence[Shard]) -> float:
    """When the run last read one of its shards; without a run, when the last one was written."""
    times = [use.used for shard in mine for use in shard.uses if use.run == run]
    return max(times or [shard.written for shard in mine])


def _object(where: Path, every: Sequence[Shard], copied: Sequence[Copy]) -> dict[str, object]:
    return {
        "format_version": 1,
        "folder": str(where),
        "bytes": sum(shard.bytes for shard in every),
        "shards": [
            {
                "name": shard.name,
                "bytes": shard.bytes,
                "entries": shard.entries,
                "written": shard.written,
                "runs": {use.run: use.used for use in shard.uses},
            }
            for shard in every
        ],
        "copies": [
            {
                "kind": copy.kind,
                "name": copy.name,
                "bytes": copy.bytes,
                "written": copy.written,
                "runs": {use.run: use.used for use in copy.uses},
            }
            for copy in copied
        ],
    }
