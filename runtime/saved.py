"""Finds the complete checkpoints of a run by looking. Imports no torch, so that plans may ask."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

STATE = "state.json"
"""The last file of a checkpoint to be written: steps done, and the size of every other file."""
NAME = re.compile(r"step-(\d{6,})")


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return checkpoints / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    assert isinstance(state, dict)
    return state


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a checkpoint with all of its files at their full size."""
    try:
        sizes = read_state(folder)["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def complete(checkpoints: Path) -> list[Path]:
    """The complete checkpoints, oldest first; found by looking."""
    if not checkpoints.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in checkpoints.iterdir()
        if (match := NAME.fullmatch(path.name)) and is_complete(path)
    ]
    return [path for _, path in sorted(found)]


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next(reversed(complete(checkpoints)), None)
