"""Failures that a person can cause or repair; `tuner` prints them without a traceback."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What `error` says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class RunFailed(Exception):
    """The run can't go on (exit code 1). `message` says what happened, `help` what to do."""

    def __init__(self, message: str, help: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.help = help


class MachineUnfit(RunFailed):
    """The plan is right, but this machine can't run it (exit code 3)."""


class OutOfMemory(RunFailed):
    """The device, or the host, had too little memory in `phase` (exit code 1)."""

    def __init__(self, message: str, help: str, phase: str, *, on_host: bool = False) -> None:
        super().__init__(message, help)
        self.phase, self.on_host = phase, on_host


class InUse(RunFailed):
    """Another process has the run folder: nothing may be written there (exit code 1)."""


class PlanChanged(RunFailed):
    """The run folder holds another plan. `changes` are (key, there, here) as text (exit code 2)."""

    def __init__(self, message: str, help: str, changes: tuple[tuple[str, str, str], ...]) -> None:
        super().__init__(message, help)
        self.changes = changes
