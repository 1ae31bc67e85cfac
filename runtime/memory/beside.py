"""Work beside one's own, in a process of its own: one simulation keeps one core busy."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def beside(work: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Inside, `work` goes on in a forked process; what is yielded waits for its result.

    What `work` changes in memory is lost, and its result must be what `pickle` can carry. Where
    there can be no such process, or it fails, `work` is done here when its result is asked for.
    """
    if not possible():
        yield work
        return
    reader, writer = os.pipe()
    process = forked(lambda: _work(work, writer))
    os.close(writer)
    child = _Child(process, reader)
    try:
        yield lambda: child.result(work)
    finally:
        child.end()


def forked(work: Callable[[], None]) -> int:
    """A new process that does `work` and ends; its number. Nothing of this process's (buffers,
    handlers, clean-up) is run or written there."""
    with warnings.catch_warnings():
        # From Python 3.12 on: about threads, such as those that matrix libraries keep waiting.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        work()
        code = 0
    finally:
        os._exit(code)


def ended(process: int) -> None:
    """Kill the process if it still runs, and wait until it is gone."""
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def possible() -> bool:
    """Whether this process may fork and a core is there for the other one.

    Not with further Python threads, whose locks a fork would copy as they are, nor on a CUDA
    device, whose context is lost in a fork.
    """
    torch = sys.modules.get("torch")
    return (
        sys.platform == "linux"
        and len(os.sched_getaffinity(0)) > 1
        and threading.active_count() == 1
        and not (torch and torch.cuda.is_initialized())
    )


class _Child:
    def __init__(self, process: int, reader: int) -> None:
        self._process = process
        self._reader: int | None = reader

    def result(self, work: Callable[[], T]) -> T:
        """What the process has found; else what `work` gives here."""
        assert self._reader is not None, "asked for once"
        reader, self._reader = self._reader, None
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read()
        try:
            found: T = pickle.loads(told)
        except Exception:
            return work()  # and raises here what it raised there
        return found

    def end(self) -> None:
        """Leave no process behind."""
        if self._reader is not None:  # nobody wants the result
            os.close(self._reader)
        ended(self._process)


def _work(work: Callable[[], Any], writer: int) -> None:
    told = pickle.dumps(work())
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(told)
