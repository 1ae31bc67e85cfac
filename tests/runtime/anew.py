"""Processes that are started anew: in which nothing was done before.

One interpreter loads the libraries, and nothing of ours, and does nothing else; each process is a
fork of it, and none but the first waits for the libraries.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parents[2]
SECONDS = 300.0  # until a process is there
NUMBERS = count()


@cache
def _nursery() -> TextIO:
    """What that of this process reads; it ends when this one does. It is no child of this one: some
    tests look whether they have left any."""
    command = [sys.executable, str(Path(__file__).with_name("nursery.py"))]
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        subprocess.Popen(command, cwd=ROOT, stdin=read)
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(read)
    return os.fdopen(write, "w", encoding="utf-8")


class Anew:
    """`python -m module` or `python -c code`; has what is used of `subprocess.Popen`.

    What it says goes to the files `out` and `err`; its pid and code are noted beside `out`. Our
    packages are found as in the tests.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        module: str = "",
        code: str = "",
        cwd: Path = ROOT,
        out: Path,
        err: Path,
    ) -> None:
        nursery = _nursery()
        self._kept = out.with_name(f".anew-{next(NUMBERS)}")
        asked = {
            "module": module,
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "environment": {**os.environ, "PYTHONPATH": str(ROOT)},
            "out": str(out),
            "err": str(err),
            "kept": str(self._kept),
        }
        nursery.write(json.dumps(asked) + "\n")
        nursery.flush()
        until = time.monotonic() + SECONDS
        while (pid := self._noted(".pid")) is None:
            assert time.monotonic() < until, "no process was made"
            time.sleep(0.005)
        self.pid = pid

    def _noted(self, what: str) -> int | None:
        path = self._kept.with_suffix(what)
        return int(path.read_text()) if path.exists() else None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._noted(".code")

    def wait(self, timeout: float = SECONDS) -> int:
        """The exit code, once it is there."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < until, "it does not end"
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Unless it has ended."""
        self.send_signal(signal.SIGKILL)
