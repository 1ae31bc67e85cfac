"""The compiler with this machine's facts handed in; what `plan` and `run` have in common."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from attrs import evolve

from compiler.compile import Compiled, compile_file, default_cache
from compiler.diagnostics import Diagnostic, render, summary
from compiler.site import Site
from tuner.exits import DONE, REFUSED, UNFIT
from tuner.screen import err, style_for

SIMULATIONS = "simulations"
UNFIT_CODES = frozenset({"does-not-fit", "disk-full"})  # errors of this machine, not of the recipe


def compile_here(path: Path, overrides: Sequence[str], *, simulate: bool = True) -> Compiled:
    """The recipe at `path`, compiled for this machine. Writes nothing. Without `simulate`, peak
    memory stays unknown and nothing slow is imported."""
    from compiler.data.index import HEADERS, Index
    from runtime.machine import look
    from tuner.shelf import presets
    from tuner.simulations import memory_model

    index = Index(default_cache() / HEADERS)
    compiled = compile_file(
        path,
        overrides=overrides,
        machine=look,
        memory_model=memory_model(default_cache() / SIMULATIONS) if simulate else None,
        index=index,
        presets=presets(),
        site=_here,
    )
    if compiled.plan is not None:  # a recipe that is refused leaves nothing behind
        index.save()
    return compiled


def _here() -> Site:
    from runtime.site import Here

    return Here(default_cache())


def judged(compiled: Compiled, *, strict: bool) -> tuple[Diagnostic, ...]:
    """All diagnostics; with `strict`, warnings are errors."""
    if not strict:
        return compiled.diagnostics
    return tuple(
        evolve(fault, severity="error") if fault.severity == "warning" else fault
        for fault in compiled.diagnostics
    )


def show_diagnostics(diagnostics: Sequence[Diagnostic], compiled: Compiled, name: str) -> None:
    """All of them on stderr, with a count at the end."""
    style = style_for(sys.stderr)
    for fault in diagnostics:
        err(render(fault, compiled.texts, style) + "\n")
    if diagnostics:
        err(summary(diagnostics, name))


def exit_code(diagnostics: Sequence[Diagnostic]) -> int:
    """0 without errors; 3 if this machine alone is at fault; else 2."""
    errors = [fault for fault in diagnostics if fault.severity == "error"]
    if not errors:
        return DONE
    return UNFIT if all(fault.code in UNFIT_CODES for fault in errors) else REFUSED
