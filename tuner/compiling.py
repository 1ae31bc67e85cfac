"""The compiler with this machine's facts handed in; what `plan` and `run` have in common."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from attrs import evolve

from compiler.compile import Compiled, compile_file, default_cache
from compiler.diagnostics import Diagnostic, render, summary
from tuner.exits import DONE, REFUSED, UNFIT
from tuner.screen import err, style_for

INDEX = "headers.sqlite"  # in the cache folder: sizes of pictures that were seen before
SIMULATIONS = "simulations"
UNFIT_CODES = frozenset({"does-not-fit"})  # errors of this machine, not of the recipe


def compile_here(path: Path, overrides: Sequence[str]) -> Compiled:
    """The recipe at `path`, compiled for this machine. Writes nothing."""
    from compiler.data.index import Index
    from runtime.machine import look
    from tuner.simulations import KeptSimulations

    index = Index(default_cache() / INDEX)
    compiled = compile_file(
        path,
        overrides=overrides,
        machine=look(),
        memory_model=KeptSimulations(default_cache() / SIMULATIONS),
        index=index,
    )
    if compiled.plan is not None:  # a recipe that is refused leaves nothing behind
        index.save()
    return _with_counts(compiled)


def _with_counts(compiled: Compiled) -> Compiled:
    """The simulated counts within the plan, so that the lock and the report have them too."""
    plan = compiled.plan
    if plan is None or plan.memory.counts:
        return compiled
    memory = evolve(plan.memory, counts=dict(compiled.counts))
    return evolve(compiled, plan=evolve(plan, memory=memory))


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
