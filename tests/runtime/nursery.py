"""Run as a script: loads the libraries and nothing of ours, and forks a process for each line.

See `tests.runtime.anew`. Each line of stdin is a JSON object: `code` to execute or `module` to run,
its `arguments`, the folder `cwd`, the whole `environment`, the files `out` and `err`, and `kept`,
the path to which the pid goes (with `.pid`) and then the exit code (with `.code`).
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Ends when stdin does; in a process that was asked for, when its work does."""
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    for line in sys.stdin:
        if os.fork() == 0:
            asked = json.loads(line)
            keep(Path(asked["kept"]))
            become(asked)
            return


def keep(kept: Path) -> None:
    """Fork; return in the new process only, and note its pid and exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        return
    note(kept.with_suffix(".pid"), pid)
    note(kept.with_suffix(".code"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def note(path: Path, number: int) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(str(number))
    beside.rename(path)


def become(asked: dict[str, Any]) -> None:
    """Do the work as `python -c` and `python -m` would."""
    os.setsid()
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, name, how in (
        (0, os.devnull, os.O_RDONLY),
        (1, asked["out"], flags),
        (2, asked["err"], flags),
    ):
        os.dup2(os.open(name, how), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[0] = asked["cwd"]  # instead of this file's folder
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["-c", *asked["arguments"]]
    if asked["module"]:
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    else:
        exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
