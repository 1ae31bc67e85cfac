"""Processes that are forks of this one, which has loaded all libraries: they begin at once."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from tuner import worker


class Forked:
    """A fork that does `task` and ends with its code; has what is used of `subprocess.Popen`.

    It has a session and a stdin of its own, and writes to the files `out` and `err` if given.
    """

    def __init__(
        self,
        task: Callable[[], int],
        out: Path | None = None,
        err: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.returncode: int | None = None
        ours, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(theirs)
            _become(task, ours, out, err, environment or {})
        os.close(ours)
        self.stdin = os.fdopen(theirs, "wb")

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._look(os.WNOHANG)

    def wait(self) -> int:
        """The exit code, once it is there."""
        code = self._look(0)
        assert code is not None
        return code

    def _look(self, options: int) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, options)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Unless it has ended."""
        self.send_signal(signal.SIGKILL)


def _become(
    task: Callable[[], int],
    stdin: int,
    out: Path | None,
    err: Path | None,
    environment: Mapping[str, str],
) -> None:
    """Do `task` as a process that was started anew would. Does not return."""
    code = 70
    try:
        os.setsid()
        os.dup2(stdin, 0)
        for path, number in ((out, 1), (err, 2)):
            if path is not None:
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(environment)
        code = task()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_worker(folder: Path, rank: int, count: int, port: int) -> Forked:
    """As `tuner.launch._start`."""
    places = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_PORT": port}
    environment = {name: str(value) for name, value in places.items()}
    words = folder / f"rank-{rank}.log"
    words.touch()
    return Forked(
        lambda: worker.main([str(folder)]),
        out=words if rank else None,
        err=words if rank else None,
        environment={**environment, "MASTER_ADDR": "127.0.0.1"},
    )
