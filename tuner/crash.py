"""Our bugs: a short line for the person, the whole story in a file."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence

from compiler.secrets import without_webhook
from tuner import __version__
from tuner.exits import BUG
from tuner.screen import err


def report_bug(error: BaseException, arguments: Sequence[str]) -> int:
    """Save the traceback of `error`, say where, and return exit code 70."""
    path = _save(error, arguments)
    words = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    err(f"tuner: this is a bug in tuner, not in your recipe ({words})")
    err(f"  please report it with {path}" if path else "  its traceback could not be saved")
    return BUG


def _save(error: BaseException, arguments: Sequence[str]) -> str:
    story = "".join(traceback.format_exception(error))
    head = f"tuner {__version__}, python {platform.python_version()}, {platform.platform()}\n"
    words = without_webhook(" ".join(arguments))
    text = f"{head}tuner {words}\nin {os.getcwd()} with {sys.executable}\n\n{story}"
    try:
        handle, path = tempfile.mkstemp(prefix="tuner-bug-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return ""
    return path
