"""`metrics.jsonl`: one object a line, one line a step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from runtime import files

METRICS = "metrics.jsonl"


class JsonLines:
    """Every run has these; a line is on disk when `metrics` returns."""

    def __init__(self, path: Path, done: int) -> None:
        """Open for appending after `done` steps; lines of later steps are dropped first."""
        truncate(path, done)
        self._file = path.open("a", encoding="utf-8")

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Pictures are files already."""

    def close(self) -> None:
        """Close the file, once all of it has reached the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def rows(path: Path, done: int) -> Iterator[dict[str, Any]]:
    """The lines of the steps up to `done`, in order; none if the file is not there."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if _keeps(line, done):
                yield json.loads(line)


def truncate(path: Path, done: int) -> None:
    """Keep the lines of steps up to `done`, so that going on from there repeats none.

    A last line that was cut by a kill is dropped too.
    """
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _keeps(line, done)]
    files.write_whole(path, "".join(line + "\n" for line in kept))


def _keeps(line: str, done: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= done
    except (ValueError, KeyError, TypeError):
        return False
