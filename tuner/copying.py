"""Before a run: what its recipe names elsewhere is copied to this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compiler.compile import Compiled
from tuner import compiling
from tuner.screen import err

MISSING = "not-downloaded"


def compile_copied(path: Path, overrides: Sequence[str], *, offline: bool) -> Compiled:
    """The recipe compiled, with its data copied first where they lie elsewhere.

    Copies only where nothing else is wrong: local checks first, the network last; never with
    `offline`. Raises RunFailed where something can't be copied.
    """
    compiled = compiling.compile_here(path, overrides)
    for _ in range(2):  # a table may have to be copied before the images that it names
        errors = {fault.code for fault in compiled.diagnostics if fault.severity == "error"}
        if offline or errors != {MISSING} or compiled.draft is None:
            break
        from runtime.data.downloads import copy_pictures, copy_sources

        draft = compiled.draft
        copy_sources(draft.remotes, draft.downloads, err)
        if draft.absent:
            copy_pictures(draft.absent, draft.downloads, err)
        compiled = compiling.compile_here(path, overrides)
    return compiled
