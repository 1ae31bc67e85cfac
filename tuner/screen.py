"""The two streams: stdout carries the answer, stderr diagnostics and progress.

Colour only decorates finished text, so the words are the same in a terminal, in a pipe, in CI and
under NO_COLOR.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import TextIO

CODES: Mapping[str, str] = {
    "error": "1;31",
    "warning": "1;33",
    "note": "1;36",
    "message": "1",
    "path": "36",
    "gutter": "34",
    "caret": "1;31",
    "label": "31",
    "help": "1;32",
    "heading": "1",
    "made": "32",
    "changed": "33",
    "quiet": "2",
}
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def prepare() -> None:
    """Make both streams take any text: what their encoding lacks is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def out(text: str) -> None:
    """The answer, on stdout."""
    _write("stdout", text)


def err(text: str) -> None:
    """A diagnostic or a remark, on stderr."""
    _write("stderr", text)


def colours(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether to colour: NO_COLOR (no-color.org) wins, then FORCE_COLOR, then the terminal."""
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return stream.isatty() and environment.get("TERM") != "dumb"


def lively(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a moving progress bar may be drawn: a real terminal, and nobody's log."""
    in_ci = environment.get("CI", "") not in ("", "0", "false")
    return stream.isatty() and environment.get("TERM") != "dumb" and not in_ci


def paint(role: str, text: str) -> str:
    """`text` with the colour of `role` around it; a style for `compiler.diagnostics.render`."""
    code = CODES.get(role)
    return f"\x1b[{code}m{text}\x1b[0m" if code and text else text


def unpainted(role: str, text: str) -> str:
    """A style that adds nothing."""
    return text


def style_for(stream: TextIO) -> Callable[[str, str], str]:
    """`paint` where the stream shows colours, else `unpainted`."""
    return paint if colours(stream) else unpainted


def bare(text: str) -> str:
    """`text` without colour codes."""
    return _ESCAPE.sub("", text)


def _write(name: str, text: str) -> None:
    """Write a line; a reader that has gone (`tuner plan x | head`) is no error of ours."""
    stream = getattr(sys, name)
    try:
        stream.write(text + "\n")
        stream.flush()
    except BrokenPipeError:
        # Everything after goes nowhere, also Python's own flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
