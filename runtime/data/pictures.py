"""Copies of single pictures on the web, which rows of tables name.

A picture that a server refuses is noted as such, and the plan names it like a broken one; deleting
the note tries again. What a server says of a picture's state is kept in one SQLite file, so that a
run can ask whether it has changed. Deleting that file costs only time.
"""

from __future__ import annotations

import sqlite3
import urllib.error
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from attrs import frozen

from compiler.data.scan import shown
from compiler.data.sources.remote import FAILED, picture_path
from runtime.data import web
from runtime.errors import RunFailed
from runtime.files import write_whole

MAX_PICTURE = 1 << 30
"""Bytes; a longer answer is no picture."""
STATES = "urls.sqlite"
"""The file of their states, in the folder of copies."""
_TRIES = 2
_WORKERS = 16  # connections at once


@frozen(kw_only=True)
class _Got:
    """What came of one picture."""

    why: str = ""  # why it can't be had
    answered: bool = True  # whether anybody did
    mark: str = ""  # its state


def copy_pictures(urls: Iterable[str], downloads: Path, say: Callable[[str], None]) -> None:
    """Copy single pictures. Raises RunFailed where none can be had: then it is the connection."""
    todo = list(dict.fromkeys(urls))
    say(f"copying {len(todo):,} images from the web into {downloads}")
    found = _fetched(todo, downloads)
    failed = {url: got.why for url, got in found.items() if got.why}
    if failed and not any(got.answered for got in found.values()):
        url, why = next(iter(failed.items()))
        raise RunFailed(
            f"none of {len(todo):,} images can be downloaded: {shown(url)}: {why}",
            help="is there a connection? What was copied before is kept",
        )
    for url, why in failed.items():
        path = picture_path(downloads, url)
        write_whole(path.with_name(path.name + FAILED), why)


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
    why = ""
    for _ in range(_TRIES):
        try:
            with web.opened(url) as answer, web.partial(path) as file:
                web.copy(answer, file, MAX_PICTURE)
            return _Got(mark=_mark(answer))
        except urllib.error.HTTPError as error:
            why = web.why(error)
            if error.code < 500:
                return _Got(why=why)
        except urllib.error.URLError as error:
            why = web.why(error)
        except (HTTPException, TimeoutError, ConnectionError, ValueError) as error:
            why = web.why(error)
    return _Got(why=why, answered=False)


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
