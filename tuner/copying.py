"""Before a run: what its recipe names elsewhere is copied to this machine."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

from compiler.compile import Compiled
from compiler.data.scan import shown
from compiler.draft import Draft
from compiler.plan import Plan, lock_path
from tuner import compiling
from tuner.screen import err

MISSING = "not-downloaded"


def compile_copied(path: Path, overrides: Sequence[str], *, offline: bool) -> Compiled:
    """The recipe compiled, with its data copied first where they lie elsewhere.

    Copies only where nothing else is wrong: local checks first, the network last; never with
    `offline`. What was copied before is copied again where it has changed, but not under a run that
    was begun: it could not go on. Nor is such a run's plan without images that nobody gave changed
    by those coming; any other run asks for them again. Raises RunFailed where something can't be
    copied.
    """
    first = compiling.compile_here(path, overrides)
    compiled = _copied(first, path, overrides, offline)
    fresh = frozenset(first.draft.absent if first.draft else ())
    if not offline and _came(compiled, fresh):
        compiled = compiling.compile_here(path, overrides)
    if compiled.plan is None or compiled.draft is None:
        return compiled
    if not _renewed(compiled.plan, compiled.draft, offline, fresh):
        return compiled
    return _copied(compiling.compile_here(path, overrides), path, overrides, offline)


def _copied(compiled: Compiled, path: Path, overrides: Sequence[str], offline: bool) -> Compiled:
    """As `compiled`, once what is not here has been copied, if nothing else is wrong."""
    for _ in range(2):  # a table may have to be copied before the images that it names, and so on
        errors = {fault.code for fault in compiled.diagnostics if fault.severity == "error"}
        if offline or errors != {MISSING} or compiled.draft is None:
            break
        from runtime.data.downloads import copy_sources
        from runtime.data.pictures import copy_pictures
        from runtime.data.streams import list_containers

        draft = compiled.draft
        copy_sources(draft.remotes, draft.downloads, err)
        if draft.absent:
            copy_pictures(draft.absent, draft.downloads, err)
        if draft.unlisted:
            list_containers(draft.unlisted, err)
        compiled = compiling.compile_here(path, overrides)
    return compiled


def _came(compiled: Compiled, fresh: Set[str]) -> bool:
    """Whether images that could not be had before are here now, of a run that is not begun. Those
    that are `fresh` were asked for a moment ago."""
    errors = {fault.code for fault in compiled.diagnostics if fault.severity == "error"}
    if compiled.draft is None or errors - {"no-images"} or _begun(compiled.plan):
        return False
    later = [url for url in compiled.draft.later if url not in fresh]
    if not later:
        return False
    from runtime.data.pictures import copy_pictures

    copy_pictures(later, compiled.draft.downloads, err)
    return True


def _begun(plan: Plan | None) -> str:
    """The run folder, if the run was begun."""
    return plan.run_folder if plan and lock_path(Path(plan.run_folder)).exists() else ""


def _renewed(plan: Plan, draft: Draft, offline: bool, fresh: Set[str]) -> bool:
    """Whether copies were made again, because what they were made of has changed. Images that are
    `fresh` were copied a moment ago."""
    if offline:
        for remote in draft.copies:
            err(f"{shown(remote.url)} is not asked whether it has changed (--offline)")
        if draft.fetched:
            err(
                f"{len(draft.fetched):,} images on the web are not asked whether they have changed "
                "(--offline)"
            )
        return False
    begun = _begun(plan)
    sources = _renewed_sources(draft, begun)
    pictures = [url for url in draft.fetched if url not in fresh]
    if not pictures:
        return sources
    from runtime.data.pictures import renew_pictures

    return renew_pictures(pictures, draft.downloads, err, begun=begun) or sources


def _renewed_sources(draft: Draft, begun: str) -> bool:
    if not draft.copies:
        return False
    from runtime.data.downloads import changed_sources, copy_sources

    changed = changed_sources(draft.copies, draft.downloads, err)
    if changed and begun:
        for remote in changed:
            made, found = ("listed", "list") if remote.streamed else ("copied", "copy")
            err(
                f"{shown(remote.url)} has changed since it was {made}. {begun} was begun with the "
                f"{found} and goes on with it; a run with another name takes the new state"
            )
        return False
    copy_sources(changed, draft.downloads, err, again=True)
    return bool(changed)
