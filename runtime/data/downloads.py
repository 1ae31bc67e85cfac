"""Copies what a recipe names elsewhere into the user's cache folder, before a plan is made.

Each file is copied once and appears whole or not at all; what was copied before an interruption is
not copied again, unless the original has changed: then what it was is removed first. Data sets of
the hub go through huggingface_hub and its own cache, stores through fsspec, files on the web
through Python's own client. Of a source that is streamed, stand-ins are written instead of copies.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compiler.data.scan import shown
from compiler.data.sources.remote import (
    HUB,
    Remote,
    hub_parts,
    is_url,
    marks_of,
    note_of,
    note_path,
)
from runtime.data import streams, web
from runtime.data.stores import below, like, listed, store_of
from runtime.errors import RunFailed
from runtime.files import write_whole

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
            what = f"{shown(remote.url)} can't be asked whether it has changed"
            say(f"{what}, {_held(remote)} is used: {web.why(error)}")
    return found


def _held(remote: Remote) -> str:
    return "what is known of it" if remote.streamed else "its copy"


def _has_changed(remote: Remote, downloads: Path) -> bool:
    known = marks_of(downloads, remote)
    if remote.url.startswith(HUB):
        now = {"": _hub_state(remote)}
    elif is_url(remote.url):
        with web.opened(remote.url, "HEAD") as answer:
            now = {"": web.state(answer)}
    else:
        store, root = store_of(remote.url)
        now = {name: mark for name, (_, mark, _) in listed(remote, store, root)[0].items()}
        if remote.streamed:
            now = {name: mark for name, mark in now.items() if streams.is_container(name)}
    said = all(now.values()) and all(known.values())
    return bool(known and now) and said and known != now


def copy_sources(
    remotes: Sequence[Remote], downloads: Path, say: Say, *, again: bool = False
) -> None:
    """Copy whole sources, or write their stand-ins; `say` is told what is copied. `again`: their
    copies are no longer what their originals are. Raises RunFailed."""
    for remote in remotes:
        changed = " again, because it has changed," if again else ""
        if remote.streamed:
            say(f"looking into {shown(remote.url)}{changed or ','} which is streamed")
        else:
            say(f"copying {shown(remote.url)}{changed} into {downloads}")
        with web.told(remote.url):
            note_path(downloads, remote).parent.mkdir(parents=True, exist_ok=True)
            if remote.streamed:
                note = streams.write_stand_ins(remote, downloads)
            elif remote.url.startswith(HUB):
                note = _from_hub(remote)
            elif is_url(remote.url):
                note = _from_web(remote, downloads, again)
            else:
                note = _from_store(remote, downloads)
            write_whole(note_path(downloads, remote), note)


def _from_web(remote: Remote, downloads: Path, again: bool) -> str:
    """One container."""
    name = streams.name_of(remote.url)
    folder = note_path(downloads, remote).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    marks = marks_of(downloads, remote)
    if again or not (folder / name).is_file():
        with web.opened(remote.url) as answer, web.partial(folder / name) as file:
            marks = {"": web.state(answer)}
            web.copy(answer, file)
    return note_of(remote, str(folder), [name], name, marks)


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
        raise RunFailed(f"the data set `{remote.url}` has no file {like(remote)}")
    return note_of(remote, root, sorted(files), ".", {"": os.path.basename(root)})


def _from_store(remote: Remote, downloads: Path) -> str:
    store, root = store_of(remote.url)
    note = note_path(downloads, remote)
    target = note.with_suffix("")
    infos, whole = listed(remote, store, root)
    if not infos:
        raise RunFailed(f"`{remote.url}` holds no file {like(remote)}")
    copies = {name: below(target, name) for name in infos}
    marks = {name: mark for name, (_, mark, _) in infos.items()}
    known = marks_of(downloads, remote)
    stale = {name for name, mark in marks.items() if known.get(name, mark) != mark}
    for old in [copies[name] for name in stale] + _others(target, set(copies.values())):
        old.unlink(missing_ok=True)
    # No file yet: nobody reads it before it is whole, but whoever goes on knows these states.
    write_whole(note, note_of(remote, str(target), [], whole, marks))
    for name, copy in copies.items():
        path = infos[name][0]
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.is_file() or copy.stat().st_size != store.size(path):
            with store.open(path, "rb") as source, web.partial(copy) as file:
                shutil.copyfileobj(source, file, web.BLOCK)
    return note_of(remote, str(target), sorted(copies), whole, marks)


def _others(folder: Path, known: set[Path]) -> list[Path]:
    """Copies in `folder` of what is no more."""
    there = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    return [path for path in there if path not in known]
