"""A generated text to where the person wants it: stdout, or a file."""

from __future__ import annotations

from pathlib import Path

from tuner.exits import DONE, FAILED
from tuner.screen import err, out


def deliver(text: str, path: Path | None) -> int:
    """`text`, which ends in a line break, on stdout or in the file at `path`; 1 if it can't be."""
    if path is None:
        out(text.removesuffix("\n"))
        return DONE
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        err(f"error: `{path}` can't be written: {error.strerror or error}")
        return FAILED
    return DONE
