"""Starts one process for each device of a plan, and watches over them.

Each is a `tuner.worker` in a session of its own, so that Ctrl-C reaches them only through here and
all of them are asked to stop at the same time. When one fails or is killed, the others can't go on:
they are asked to end, and ended if they don't.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler import lock
from compiler.data.manifest import Manifest
from compiler.plan import Plan
from tuner.exits import DONE
from tuner.worker import MANIFEST, OUTCOME, PLAN, RECIPE, failed_file

if TYPE_CHECKING:
    from runtime.errors import RunFailed
    from runtime.execute import Outcome

GRACE_SECONDS = 10.0  # to end in, once one has
POLL_SECONDS = 0.05
TAIL = 2000  # characters of a lost rank's last words
Workers = Sequence["subprocess.Popen[bytes]"]


class WorkerBug(Exception):
    """A rank ended with an exception that is ours; the message is its traceback."""


def launch(plan: Plan, manifest: Manifest, recipe: str) -> Outcome:
    """Run `plan` in as many processes as it has ranks; how it ended, as `runtime.execute` tells it.

    Raises what rank 0 raised there, or RunFailed naming the rank that was lost.
    """
    with tempfile.TemporaryDirectory(prefix="tuner-ranks-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / PLAN).write_text(lock.dumps(plan), encoding="utf-8")
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
        manifest.save(folder / MANIFEST)
        workers: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, workers)
        asked = stack.enter_context(_forwarding(workers))
        port = _free_port()
        for rank in range(plan.steps.ranks):
            workers.append(_start(folder, rank, plan.steps.ranks, port))
        killed = _watch(workers)
        return _verdict(plan, folder, workers, killed, stopped=bool(asked))


def _start(folder: Path, rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    """Rank 0 shows what it does; what the others print goes to a file."""
    places = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_PORT": port}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    environment |= {name: str(value) for name, value in places.items()}
    environment["MASTER_ADDR"] = "127.0.0.1"
    with _words_of(folder, rank).open("wb") as words:
        return subprocess.Popen(
            [sys.executable, "-m", "tuner.worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=None if rank == 0 else words,
            stderr=None if rank == 0 else words,
            env=environment,
            start_new_session=True,
        )


def _words_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _forwarding(workers: Workers) -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM go to all workers; gives the list of those that came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def forward(number: int, frame: object) -> None:
        came.append(number)
        _tell(workers, number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(workers: Workers, number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            with suppress(ProcessLookupError):
                worker.send_signal(number)


def _watch(workers: Workers) -> set[int]:
    """Wait for all; returns the ranks that had to be ended by force.

    The others may have done their part long before rank 0, which has the result to write and the
    last pictures to draw.
    """
    since: float | None = None
    while None in (codes := [worker.poll() for worker in workers]):
        over = codes[0] is not None or any(code not in (None, DONE) for code in codes)
        if over and since is None:
            since = time.monotonic()
            if codes[0] is None or codes[0] != DONE:
                _tell(workers, signal.SIGTERM)
        if since is not None and time.monotonic() - since > GRACE_SECONDS:
            break
        time.sleep(POLL_SECONDS)
    late = {rank for rank, worker in enumerate(workers) if worker.poll() is None}
    _end(workers)
    return late


def _end(workers: Workers) -> None:
    """End what still runs."""
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()
        if worker.stdin is not None:
            worker.stdin.close()


def _verdict(
    plan: Plan, folder: Path, workers: Workers, ended: set[int], *, stopped: bool
) -> Outcome:
    """How the run ended: by what rank 0 says, else by whoever failed of itself, else was lost."""
    ranks = range(len(workers))
    outcome = _read(folder / OUTCOME)
    if outcome is not None and (stopped or outcome["status"] != "stopped"):
        return _outcome(plan, outcome)
    failures = {rank: _read(folder / failed_file(rank)) for rank in ranks}
    own = {r: f for r, f in failures.items() if f is not None and f["kind"] != "RanksLost"}
    if own:
        first = min(own)
        raise _raised(own[first], first)
    lost = [r for r in ranks if failures[r] is None and r not in ended and _failed(workers[r])]
    if lost:
        raise _lost(folder, lost[0], workers[lost[0]].returncode)
    if outcome is not None:  # stopped by a file, or by a signal of its own
        return _outcome(plan, outcome)
    if stopped:
        return _outcome(plan, {"status": "stopped", "step": None, "measured": {}, "result": None})
    raise _raised({"kind": "RunFailed", "message": "the ranks ended without a result"}, 0)


def _failed(worker: subprocess.Popen[bytes]) -> bool:
    """Whether it ended otherwise than by what it was told."""
    return worker.returncode not in (DONE, 130, -signal.SIGTERM, -signal.SIGINT)


def _outcome(plan: Plan, found: Mapping[str, Any]) -> Outcome:
    from runtime.context import saved_step
    from runtime.execute import Outcome

    folder = Path(plan.run_folder)
    step = found["step"]
    return Outcome(
        status=found["status"],
        run_folder=folder,
        step=saved_step(folder) if step is None else step,
        result=None if found["result"] is None else Path(found["result"]),
        measured=found["measured"],
    )


def _raised(failure: Mapping[str, Any], rank: int) -> Exception:
    """What rank `rank` raised, to be raised here. What all ranks find, rank 0 tells."""
    from runtime.errors import InUse, MachineUnfit, OutOfMemory, PlanChanged, RunFailed

    message = failure["message"] if rank == 0 else f"rank {rank}: {failure['message']}"
    help = failure.get("help", "")
    match failure["kind"]:
        case "bug":
            return WorkerBug(message)
        case "OutOfMemory":
            on_host = failure.get("on_host", False)
            return OutOfMemory(message, help, failure["phase"], on_host=on_host)
        case "PlanChanged":
            key_old_new = tuple((k, old, new) for k, old, new in failure["changes"])
            return PlanChanged(message, help, key_old_new)
        case "MachineUnfit":
            return MachineUnfit(message, help)
        case "InUse":
            return InUse(message, help)
    return RunFailed(message, help)


def _lost(folder: Path, rank: int, code: int) -> RunFailed:
    from runtime.errors import RunFailed

    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was killed ({signal.Signals(-code).name})"
    words = _words_of(folder, rank).read_text(encoding="utf-8", errors="replace")[-TAIL:].strip()
    said = f"; its last words:\n{words}" if words else ""
    return RunFailed(
        f"rank {rank} {how}, so the run can't go on{said}",
        help="what was saved is whole: run again. A rank that is killed often means that host "
        "memory ran out: `dmesg` tells",
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found
