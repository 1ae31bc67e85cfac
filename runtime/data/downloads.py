"""Copies what a recipe names elsewhere into the user's cache folder, before a plan is made.

Each file is copied once and appears whole or not at all; what was copied before an interruption is
not copied again, unless the original has changed: then what it was is removed first. Data sets of
the hub go through huggingface_hub and its own cache, stores through fsspec, files and pictures on
the web through Python's own client. A picture that a server refuses is noted as such, and the plan
names it like a broken one; deleting the note tries again.
"""

from __future__ import annotations

import importlib
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from compiler.data.scan import shown
from compiler.data.sources.remote import (
    FAILED,
    HUB,
    Remote,
    hub_parts,
    is_url,
    marks_of,
    note_of,
    note_path,
    picture_path,
)
from runtime.errors import MachineUnfit, RunFailed
from runtime.files import PARTIAL, sync, write_whole

MAX_PICTURE = 1 << 30
"""Bytes; a longer answer is no picture."""
_PATIENCE = 30.0  # seconds without an answer
_TRIES = 2
_WORKERS = 16  # connections at once
_BLOCK = 1 << 20

_STATES = ("ETag", "etag", "md5Hash", "md5", "mtime", "LastModified", "last_modified", "updated")
"""What stores call the state of a file, the surest first; fsspec has no one name for it."""

Say = Callable[[str], None]


def changed_sources(remotes: Sequence[Remote], downloads: Path, say: Say) -> list[Remote]:
    """Those copied sources whose original is in another state now. Where that can't be asked, `say`
    is told, and the copy stands."""
    found = []
    for remote in remotes:
        try:
            if _has_changed(remote, downloads):
                found.append(remote)
        except Exception as error:  # each library has its own; the copy is whole
            why = (str(error) or type(error).__name__).splitlines()[0]
            what = f"{shown(remote.url)} can't be asked whether it has changed"
            say(f"{what}, its copy is used: {why}")
    return found


def _has_changed(remote: Remote, downloads: Path) -> bool:
    known = marks_of(downloads, remote)
    if remote.url.startswith(HUB):
        now = {"": _hub_state(remote)}
    elif is_url(remote.url):
        with _opened(remote.url, "HEAD") as answer:
            now = {"": _web_state(answer)}
    else:
        store, root = _store(remote.url)
        now = {name: mark for name, (_, mark) in _listed(remote, store, root)[0].items()}
    said = all(now.values()) and all(known.values())
    return bool(known and now) and said and known != now


def copy_sources(
    remotes: Sequence[Remote], downloads: Path, say: Say, *, again: bool = False
) -> None:
    """Copy whole sources; `say` is told what is copied. `again`: their copies are no longer what
    their originals are. Raises RunFailed."""
    for remote in remotes:
        changed = " again, because it has changed," if again else ""
        say(f"copying {shown(remote.url)}{changed} into {downloads}")
        with _told(remote.url):
            note_path(downloads, remote).parent.mkdir(parents=True, exist_ok=True)
            if remote.url.startswith(HUB):
                note = _from_hub(remote)
            elif is_url(remote.url):
                note = _from_web(remote, downloads, again)
            else:
                note = _from_store(remote, downloads)
            write_whole(note_path(downloads, remote), note)


def copy_pictures(urls: Iterable[str], downloads: Path, say: Say) -> None:
    """Copy single pictures. Raises RunFailed where none can be had: then it is the connection."""
    todo = list(dict.fromkeys(urls))
    say(f"copying {len(todo):,} images from the web into {downloads}")
    with _told(todo[0]), ThreadPoolExecutor(_WORKERS) as pool:
        found = list(pool.map(lambda url: _picture(url, picture_path(downloads, url)), todo))
    failed = [(url, why) for url, (why, _) in zip(todo, found, strict=True) if why]
    if failed and not any(answered for _, answered in found):
        raise RunFailed(
            f"none of {len(todo):,} images can be downloaded: {shown(failed[0][0])}: "
            f"{failed[0][1]}",
            help="is there a connection? What was copied before is kept",
        )
    for url, why in failed:
        path = picture_path(downloads, url)
        write_whole(path.with_name(path.name + FAILED), why)


def _picture(url: str, path: Path) -> tuple[str, bool]:
    """Copy one; returns why it can't be had ("" if it can), and whether anybody answered."""
    path.parent.mkdir(parents=True, exist_ok=True)
    why = ""
    for _ in range(_TRIES):
        try:
            with _opened(url) as answer, _partial(path) as file:
                _copy(answer, file, MAX_PICTURE)
            return "", True
        except urllib.error.HTTPError as error:
            why = f"the server says {error.code} {error.reason}"
            if error.code < 500:
                return why, True
        except urllib.error.URLError as error:
            why = str(error.reason)
        except (HTTPException, TimeoutError, ConnectionError, ValueError) as error:
            why = str(error) or type(error).__name__
    return why, False


def _opened(url: str, method: str = "GET") -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "tuner"}, method=method)
    return urllib.request.urlopen(request, timeout=_PATIENCE)


def _copy(source: IO[bytes], target: IO[bytes], most: int | None = None) -> None:
    """Raises ValueError where there are more than `most` bytes, ConnectionError where less come
    than were announced."""
    done = 0
    while block := source.read(_BLOCK):
        done += len(block)
        if most is not None and done > most:
            raise ValueError(f"longer than {most >> 20:,} MiB: this is no picture")
        target.write(block)
    told = getattr(source, "headers", {}).get("Content-Length")
    if told is not None and str(told).isdigit() and int(told) != done:
        raise ConnectionError(f"{done:,} of {int(told):,} bytes came")


@contextmanager
def _partial(path: Path) -> Iterator[IO[bytes]]:
    """A file that becomes `path` if all goes well; runs at the same time have one each."""
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        with open(partial, "wb") as file:
            yield file
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _from_web(remote: Remote, downloads: Path, again: bool) -> str:
    """One container."""
    name = os.path.basename(remote.url.partition("?")[0].partition("#")[0])
    folder = note_path(downloads, remote).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    marks = marks_of(downloads, remote)
    if again or not (folder / name).is_file():
        with _opened(remote.url) as answer, _partial(folder / name) as file:
            marks = {"": _web_state(answer)}
            _copy(answer, file)
    return note_of(str(folder), [name], name, marks)


def _web_state(answer: Any) -> str:
    """What the server says of the file's state; "" where it says nothing."""
    head = answer.headers
    state = head.get("ETag") or head.get("Last-Modified") or ""
    return f"{state} {head.get('Content-Length', '')}" if state else ""


def _hub_state(remote: Remote) -> str:
    """The commit that the data set's revision stands for now."""
    hub: Any = importlib.import_module("huggingface_hub")
    parts = hub_parts(remote.url)
    assert parts is not None, "the compiler has judged the name"
    return str(hub.HfApi().dataset_info(parts[0], revision=parts[1] or None).sha or "")


def _from_hub(remote: Remote) -> str:
    hub: Any = importlib.import_module("huggingface_hub")
    parts = hub_parts(remote.url)
    assert parts is not None, "the compiler has judged the name"
    name, revision = parts
    root = hub.snapshot_download(
        name,
        repo_type="dataset",
        revision=revision or None,
        allow_patterns=list(remote.files) or None,
    )
    files = [
        os.path.relpath(os.path.join(folder, file), root)
        for folder, _, names in os.walk(root)
        for file in names
    ]
    if not files:
        raise RunFailed(f"the data set `{remote.url}` has no file {_like(remote)}")
    return note_of(root, sorted(files), ".", {"": os.path.basename(root)})


def _like(remote: Remote) -> str:
    return "at all" if not remote.files else f"like {', '.join(remote.files)}"


def _from_store(remote: Remote, downloads: Path) -> str:
    store, root = _store(remote.url)
    note = note_path(downloads, remote)
    target = note.with_suffix("")
    infos, whole = _listed(remote, store, root)
    if not infos:
        raise RunFailed(f"`{remote.url}` holds no file {_like(remote)}")
    copies = {name: _below(target, name) for name in infos}
    marks = {name: mark for name, (_, mark) in infos.items()}
    known = marks_of(downloads, remote)
    stale = {name for name, mark in marks.items() if known.get(name, mark) != mark}
    for old in [copies[name] for name in stale] + _others(target, set(copies.values())):
        old.unlink(missing_ok=True)
    # No file yet: nobody reads it before it is whole, but whoever goes on knows these states.
    write_whole(note, note_of(str(target), [], whole, marks))
    for name, copy in copies.items():
        path = infos[name][0]
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.is_file() or copy.stat().st_size != store.size(path):
            with store.open(path, "rb") as source, _partial(copy) as file:
                shutil.copyfileobj(source, file, _BLOCK)
    return note_of(str(target), sorted(copies), whole, marks)


def _listed(remote: Remote, store: Any, root: str) -> tuple[dict[str, tuple[str, str]], str]:
    """By name: the path and the state of each file of a source, as the store says it now; and what
    of it is the source."""
    store.invalidate_cache()
    if store.isfile(root):
        name = os.path.basename(root)
        return {name: (root, _state(store.info(root)))}, name
    found = {p[len(root) :].lstrip("/"): (p, i) for p, i in store.find(root, detail=True).items()}
    picked = {n: (p, _state(i)) for n, (p, i) in found.items() if _picked(n, remote.files)}
    return picked, "."


def _state(info: Mapping[str, Any]) -> str:
    """What a store says of a file's state; "" where it says nothing."""
    said = [str(info[key]) for key in (*_STATES, "created") if info.get(key) is not None]
    return f"{said[0]} {info.get('size', '')}" if said else ""


def _others(folder: Path, known: set[Path]) -> list[Path]:
    """Copies in `folder` of what is no more."""
    there = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    return [path for path in there if path not in known]


def _picked(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def _below(folder: Path, name: str) -> Path:
    """A name of the store as a path below `folder`; some stores let a name hold `..`."""
    path = Path(os.path.normpath(folder / name))
    if path == folder or not path.is_relative_to(folder) or "\0" in name:
        raise RunFailed(f"a file of the store has a name that leads elsewhere: {shown(name)}")
    return path


def _store(url: str) -> tuple[Any, str]:
    try:
        core: Any = importlib.import_module("fsspec.core")
        store, root = core.url_to_fs(url)
    except ImportError as error:  # fsspec itself, or what it needs for this store
        raise MachineUnfit(
            f"`{shown(url)}` needs a package that is not installed: {error}",
            help='pip install "tuner[stores]"',
        ) from error
    return store, str(root).rstrip("/")


@contextmanager
def _told(url: str) -> Iterator[None]:
    """The libraries' many exceptions as one that says what could not be copied."""
    try:
        yield
    except RunFailed:
        raise
    except (OSError, ValueError, RuntimeError, HTTPException) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise RunFailed(
            f"`{shown(url)}` can't be copied: {why}",
            help="what was copied before is kept: run it again when it can be reached",
        ) from error
