"""`tuner data`: a page of what the model will see. Reads pictures, encodes and trains nothing."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path

from tuner.compiling import compile_here, exit_code, judged, show_diagnostics
from tuner.exits import DONE, FAILED
from tuner.screen import err, out


def show_data(
    recipe: Path, overrides: Sequence[str], *, path: Path | None, most: int, open_it: bool
) -> int:
    """Write the page to `path` (else NAME-data.html here) and say where it is."""
    compiled = compile_here(recipe, overrides, simulate=False)
    diagnostics = judged(compiled, strict=False)
    show_diagnostics(diagnostics, compiled, str(recipe))
    code = exit_code(diagnostics)
    if code != DONE:
        return code
    plan, manifest = compiled.plan, compiled.manifest
    assert plan is not None and manifest is not None
    from runtime.files import write_whole
    from tuner.data_page import page

    skips = compiled.draft.skips if compiled.draft else []
    names = [(plan.sources[number].id, left, why) for number, left, why in skips]
    target = path or Path(f"{plan.name}-data.html")
    try:
        write_whole(target, page(plan, manifest, compiled.outlook, diagnostics, most, names))
    except OSError as error:
        err(f"error: `{target}` can't be written: {error.strerror or error}")
        return FAILED
    out(str(target))
    if open_it:
        webbrowser.open(target.absolute().as_uri())
    return DONE
