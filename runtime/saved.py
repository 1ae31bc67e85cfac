"""Finds the complete checkpoints of a run by looking. Imports no torch, so that plans may ask."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from runtime.checksum import checksum

STATE = "state.json"
"""The last file of a checkpoint to be written: steps done, and the size of every other file.

It also has the checksums of those that one process wrote: `fault` goes by them. The parts that
ranks write side by side have none, or one of them would have to read what all have written."""
NEEDED = {"format", "step", "epoch", "plan", "versions", "files"}  # keys of it
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
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a checkpoint with all of its files at their full size."""
    try:
        state = read_state(folder)
        sizes = state["files"].items()
        return isinstance(state["step"], int) and all(
            (folder / name).stat().st_size == size for name, size in sizes
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def fault(folder: Path) -> str:
    """What is wrong with a complete checkpoint, in words that name the file; "" if nothing is.

    Reads all of its files that have a checksum.
    """
    state = read_state(folder)
    if missing := sorted(NEEDED - state.keys()):
        return f"{folder / STATE} is damaged: it does not say {' and '.join(missing)}"
    for name, written in state.get("checksums", {}).items():
        path = folder / name
        try:
            if checksum(path) != written:
                return f"{path} is damaged: it does not hold what was written"
        except OSError as error:
            return f"{path} can't be read: {error.strerror or error}"
    return ""


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
