"""The compiler with this machine's facts handed in; what `plan` and `run` have in common."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve

from compiler.compile import Compiled, compile_file
from compiler.diagnostics import Diagnostic, render, summary
from compiler.home import default_cache
from tuner.exits import DONE, REFUSED, UNFIT
from tuner.screen import err, style_for

if TYPE_CHECKING:
    from compiler.data.index import Index
    from compiler.machine import Machine
    from compiler.memory import MemoryModel
    from compiler.site import Site

UNFIT_CODES = frozenset({"does-not-fit", "disk-full"})  # errors of this machine, not of the recipe


def compile_here(
    path: Path,
    overrides: Sequence[str],
    *,
    simulate: bool = True,
    simulator: MemoryModel | None = None,
    device: str = "",
    train_below: int = 0,
) -> Compiled:
    """The recipe at `path`, compiled for this machine, or for one with another `device`, all of
    whose memory is free: the budget, unless the recipe or an override states one. Writes nothing.
    Without `simulate`, peak memory stays unknown and nothing slow is imported; a `simulator` spares
    this process the libraries. For `train_below` see `compile_file`. Raises UnknownDevice."""
    from tuner.elsewhere import elsewhere
    from tuner.shelf import presets

    machine = cache(lambda: elsewhere(_machine(), device) if device else _machine())
    if device:
        machine()  # raises where there is no such device
    indices: list[Index] = []
    compiled = compile_file(
        path,
        overrides=overrides,
        machine=machine,
        memory_model=(lambda: _memory_model(machine(), simulator)) if simulate else None,
        index=lambda: _index(indices),
        presets=presets(),
        site=_here,
        train_below=train_below,
    )
    if compiled.plan is not None:  # a recipe that is refused leaves nothing behind
        for index in indices:
            index.save()
    return compiled


def _machine() -> Machine:
    from runtime.machine import look

    return look()


def _memory_model(machine: Machine, simulator: MemoryModel | None) -> MemoryModel:
    from runtime.memory.corrections import CORRECTIONS, CorrectedMemoryModel, read
    from tuner.simulations import SIMULATIONS, memory_model

    model = memory_model(default_cache() / SIMULATIONS, simulator)
    known = read(default_cache() / CORRECTIONS)
    return CorrectedMemoryModel(model, known, machine) if known else model


def _index(made: list[Index]) -> Index:
    from compiler.data.index import HEADERS, Index

    made.append(Index(default_cache() / HEADERS))
    return made[-1]


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
