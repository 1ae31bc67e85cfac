"""Copies of single pictures on the web, which rows of tables name.

A picture that a server refuses is noted as such, and the plan names it like a broken one; deleting
the note tries again. Where a server is silent or busy (5xx, 429) it refuses nothing: whoever needs
the picture asks again, and only one that had none to give for an hour counts as one that refuses.
What a server says of a picture's state is kept in one SQLite file, so that a
run can ask whether it has changed. Deleting that file costs only time.
"""

from __future__ import annotations

import sqlite3
import time
import urllib.error
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from attrs import frozen

from compiler.data.scan import shown
from compiler.data.sources.remote import FAILED, LATER, picture_path
from runtime.data import web
from runtime.errors import RunFailed
from runtime.files import write_whole

MAX_PICTURE = 1 << 30
"""Bytes; a longer answer is no picture."""
STATES = "urls.sqlite"
"""The file of their states, in the folder of copies."""
_TRIES = 2
_BUSY = (408, 425, 429)  # answers that say: later
_PAUSE = 0.5  # seconds before the next try, where the server says nothing of it
_LONGEST = 10.0  # seconds that are waited because a server says so
_PATIENCE = 3600.0  # seconds after the first try from which on a busy server refuses,
_FORGOTTEN = 86400.0  # and those after which it is no longer the first
_WORKERS = 16  # connections at once


@frozen(kw_only=True)
class _Got:
    """What came of one picture."""

    why: str = ""  # why it can't be had
    reached: bool = True  # whether anybody answered
    answered: bool = True  # and that for good
    mark: str = ""  # its state


def copy_pictures(urls: Iterable[str], downloads: Path, say: Callable[[str], None]) -> None:
    """Copy single pictures. Raises RunFailed where nobody answers: then it is the connection."""
    todo = list(dict.fromkeys(urls))
    say(f"copying {len(todo):,} images from the web into {downloads}")
    found = _fetched(todo, downloads)
    failed = {url: got.why for url, got in found.items() if got.why}
    new = [url for url in failed if not _later(url, downloads).exists()]
    if new and not any(got.reached for got in found.values()):
        url, why = new[0], failed[new[0]]
        raise RunFailed(
            f"none of {len(todo):,} images can be downloaded: {shown(url)}: {why}",
            help="is there a connection? What was copied before is kept",
        )
    later = [url for url, why in failed.items() if not _refused(url, why, found[url], downloads)]
    if later:
        url = later[0]
        say(
            f"{len(later):,} of {len(todo):,} images can't be had now and are asked for again: "
            f"{shown(url)}: {failed[url]}"
        )


def _refused(url: str, why: str, got: _Got, downloads: Path) -> bool:
    """Note why a picture can't be had; whether that is for good."""
    path = picture_path(downloads, url)
    first = _later(url, downloads)
    if not got.answered:
        waited = time.time() - first.stat().st_mtime if first.exists() else _FORGOTTEN
        if waited >= _FORGOTTEN:
            write_whole(first, why)
        if not _PATIENCE <= waited < _FORGOTTEN:
            return False
    write_whole(path.with_name(path.name + FAILED), why)
    first.unlink(missing_ok=True)
    return True


def renew_pictures(
    urls: Iterable[str], downloads: Path, say: Callable[[str], None], *, begun: str = ""
) -> bool:
    """Ask of each picture that was copied whether it has changed, and copy those that have; whether
    there are any. `begun`: a run that must go on with what it has, so that `say` is only told. A
    server's silence is no change. Raises RunFailed where a copy can't be written."""
    asked = list(dict.fromkeys(urls))
    states = _States(downloads)
    known = states.read(asked)
    with ThreadPoolExecutor(_WORKERS) as pool:
        found = dict(zip(asked, pool.map(_asked, asked), strict=True))
    silent = {url: got.why for url, got in found.items() if got.why}
    if silent:
        url, why = next(iter(silent.items()))
        say(
            f"{len(silent):,} of {len(asked):,} images on the web can't be asked whether they have "
            f"changed, their copies are used: {shown(url)}: {why}"
        )
    now = {url: got.mark for url, got in found.items() if not got.why}
    changed = [url for url, mark in now.items() if _differs(known.get(url), mark, downloads, url)]
    states.write({url: mark for url, mark in now.items() if url not in known})
    if not changed:
        return False
    count = f"{len(changed):,} of {len(asked):,} images on the web"
    if begun:
        say(f"{count} have changed. {begun} was begun with their copies and goes on with them")
        return False
    say(f"{count} have changed and are copied again")
    lost = {url: got.why for url, got in _fetched(changed, downloads).items() if got.why}
    for url, why in lost.items():
        say(f"{shown(url)} can't be copied again, its copy is used: {why}")
    return len(lost) < len(changed)


def _differs(known: str | None, now: str, downloads: Path, url: str) -> bool:
    """Whether the state is another. Of what was copied before states were kept, the length tells;
    where a server names no state, too."""
    if known is not None:
        return known != now
    length = now.rpartition(" ")[2]
    return length.isdigit() and int(length) != picture_path(downloads, url).stat().st_size


def _fetched(urls: Sequence[str], downloads: Path) -> dict[str, _Got]:
    """Copy pictures anew, and keep their states."""
    with web.told(urls[0]), ThreadPoolExecutor(_WORKERS) as pool:
        got = pool.map(lambda url: _picture(url, picture_path(downloads, url)), urls)
        found = dict(zip(urls, got, strict=True))
        _States(downloads).write({url: one.mark for url, one in found.items() if not one.why})
    return found


def _picture(url: str, path: Path) -> _Got:
    path.parent.mkdir(parents=True, exist_ok=True)
    got, pause = _Got(), 0.0
    for _ in range(_TRIES):
        time.sleep(pause)
        pause = _PAUSE
        try:
            with web.opened(url) as answer, web.partial(path) as file:
                web.copy(answer, file, MAX_PICTURE)
            path.with_name(path.name + LATER).unlink(missing_ok=True)
            return _Got(mark=_mark(answer))
        except urllib.error.HTTPError as error:
            busy = error.code >= 500 or error.code in _BUSY
            got, pause = _Got(why=web.why(error), answered=not busy), _pause(error)
            if not busy:
                return got
        except (urllib.error.URLError, TimeoutError, ConnectionResetError) as error:
            got = _Got(why=web.why(error), reached=False, answered=False)
        except (HTTPException, ConnectionError, ValueError) as error:
            got = _Got(why=web.why(error))
    return got


def _later(url: str, downloads: Path) -> Path:
    """The note that a picture could not be had at first."""
    path = picture_path(downloads, url)
    return path.with_name(path.name + LATER)


def _pause(error: urllib.error.HTTPError) -> float:
    """Seconds to wait, as a busy server says it."""
    said = str(error.headers.get("Retry-After", ""))
    return min(float(said), _LONGEST) if said.isdigit() else _PAUSE


def _asked(url: str) -> _Got:
    """The state of a picture on the web."""
    try:
        with web.opened(url, "HEAD") as answer:
            return _Got(mark=_mark(answer))
    except web.FAILURES as error:
        return _Got(why=web.why(error))


def _mark(answer: Any) -> str:
    return web.state(answer) or f" {answer.headers.get('Content-Length', '')}"


class _States:
    """The states of copied pictures, by the names of their copies."""

    def __init__(self, downloads: Path) -> None:
        self._path = downloads / STATES

    def read(self, urls: Sequence[str]) -> dict[str, str]:
        """Those that are known."""
        if not self._path.is_file():
            return {}
        with suppress(sqlite3.Error), closing(sqlite3.connect(self._path, timeout=30)) as database:
            rows = dict(database.execute("SELECT name, mark FROM states").fetchall())
            names = {url: picture_path(self._path.parent, url).name for url in urls}
            return {url: rows[name] for url, name in names.items() if name in rows}
        return {}

    def write(self, marks: Mapping[str, str]) -> None:
        """Keep them; where that can't be, it costs only that they are asked for again."""
        if not marks:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = [(picture_path(self._path.parent, url).name, mark) for url, mark in marks.items()]
        with suppress(sqlite3.Error), closing(sqlite3.connect(self._path, timeout=30)) as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS states (name TEXT PRIMARY KEY, mark TEXT) WITHOUT ROWID"
            )
            database.executemany("INSERT OR REPLACE INTO states VALUES (?, ?)", rows)
            database.commit()
