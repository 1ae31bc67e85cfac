"""A small recipe to hand to a command, planned without simulating anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.compile import Compiled
from tests.compiler.recipes import MACHINE, RECIPE, compiled, project

PROMPTS = '[validation]\nprompts = { beach = "a beach" }\n'


def recipe_here(folder: Path, patch: pytest.MonkeyPatch, text: str = RECIPE + PROMPTS) -> Path:
    """The recipe's path; commands compile for a machine of no interest, without torch."""

    def compile_here(
        path: Path,
        overrides: list[str],
        *,
        simulate: bool = True,
        simulator: object = None,
        device: str = "",
    ) -> Compiled:
        return compiled(path, *overrides, machine=MACHINE)

    patch.setattr("tuner.compiling.compile_here", compile_here)
    return project(folder, text)
