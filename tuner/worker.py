"""One of several processes that train together, started by `tuner run` or another launcher.

    python -m tuner.worker FOLDER

FOLDER holds the plan, its list of samples and the recipe's text; what becomes of it is written
there, for the process that started this one: `outcome.json` by rank 0, `failed-RANK.json` by a rank
that fails. When that process ends, so does this one.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from compiler import lock
from compiler.data.manifest import Manifest, ManifestDamaged
from compiler.plan import Plan, lock_path
from runtime.segments import map_by_pages, number_by_bus
from tuner.exits import BUG, DONE, FAILED, STOPPED, UNFIT
from tuner.screen import err, prepare

if TYPE_CHECKING:
    from runtime.execute import Outcome
    from runtime.ranks import Group, Ranks

PLAN, MANIFEST, RECIPE, OUTCOME = "plan.lock.toml", "manifest.jsonl", "recipe.toml", "outcome.json"
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OFFER = "plan"  # in the ranks' store


class BadEnvironment(Exception):
    """Another launcher's variables that can't be used; says which."""


@frozen
class Seat:
    """What another launcher says of this process."""

    rank: int
    count: int


def seat(environment: Mapping[str, str] = os.environ) -> Seat | None:
    """This process's place in what another launcher started; None where none did.

    A launcher is known by RANK and WORLD_SIZE. Raises BadEnvironment if others are missing or
    wrong.
    """
    if not {"RANK", "WORLD_SIZE"} <= environment.keys():
        return None
    missing = [name for name in NEEDED if not environment.get(name)]
    if missing:
        raise BadEnvironment(f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}")
    numbers = {}
    for name in NEEDED:
        if name != "MASTER_ADDR":
            try:
                numbers[name] = int(environment[name])
            except ValueError:
                found = environment[name]
                raise BadEnvironment(f"{name} must be a whole number, not `{found}`") from None
    rank, count = numbers["RANK"], numbers["WORLD_SIZE"]
    if not 0 <= rank < count or numbers["LOCAL_RANK"] < 0:
        raise BadEnvironment(f"there is no rank {rank} among {count} processes")
    return Seat(rank, count)


def failed_file(rank: int) -> str:
    """Where a rank writes how it failed."""
    return f"failed-{rank}.json"


def shown(plan: Plan, manifest: Manifest, recipe: str, ranks: Ranks) -> Outcome:
    """Execute in this process, with what happens shown and noted."""
    execute = _execute()
    from tuner.noting import Noted
    from tuner.progress import progress

    events = Noted(progress(plan), Path(plan.run_folder))
    try:
        return execute(plan, manifest, events, recipe=recipe, ranks=ranks)
    finally:
        events.close()


def _execute() -> Callable[..., Outcome]:
    """`runtime.execute.execute`. What libraries say while they are imported reaches no screen, also
    where the run is refused."""
    from runtime.quiet import native_output

    with native_output(Path(os.devnull)):
        from runtime.execute import execute
    return execute


def lead(plan: Plan, manifest: Manifest, recipe: str) -> Outcome:
    """Train as rank 0 of the processes that another launcher started; the others are given the
    plan, since their own might differ by what is free on their device."""
    from runtime.errors import MachineUnfit, PlanChanged, RunFailed

    group = _joined()
    group.offer(OFFER, lock.dumps(plan))
    try:
        return shown(plan, manifest, recipe, group)
    except PlanChanged:
        raise  # it may be accepted, and tried again
    except RunFailed as error:
        group.fail(UNFIT if isinstance(error, MachineUnfit) else FAILED)
        raise


@contextmanager
def leading() -> Iterator[Callable[[int], int]]:
    """Inside, rank 0 of another launcher's processes is to hand its exit code through. However it
    ends but well, the ranks that follow hear of it and end with the same code."""
    codes = [BUG]

    def keep(code: int) -> int:
        codes.append(code)
        return code

    try:
        yield keep
    except KeyboardInterrupt:
        codes.append(STOPPED)  # and so did all others, who were interrupted too
        raise
    finally:
        if codes[-1] not in (DONE, STOPPED):
            _dismiss(codes[-1])


def _dismiss(code: int) -> None:
    from runtime.quiet import native_output

    with native_output(Path(os.devnull)):  # what libraries say while they are imported
        from runtime.errors import RunFailed
    with suppress(RunFailed):  # there is nobody to tell
        _joined().dismiss(code)


@cache
def _joined() -> Group:
    """A process joins the others once."""
    from runtime.ranks import join

    return join()


def follow() -> int:
    """Train as one of the other launcher's ranks that do not lead: rank 0 says what. Exit code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is rank 0's to tell
    from runtime.quiet import native_output

    with native_output(Path(os.devnull)):  # what libraries say while they are imported
        from runtime.errors import MachineUnfit, RunFailed
        from runtime.events import Silent
        from runtime.ranks import RanksLost, join

    group = None
    try:
        group = join()
        plan = lock.loads(group.wanted(OFFER))
        execute = _execute()  # imports far more, which a recipe that is refused needs not
        manifest = _same_samples(plan)
        status = execute(plan, manifest, Silent(), ranks=group).status
    except RanksLost as error:
        return FAILED if error.code is None else error.code  # who was lost has said why
    except RunFailed as error:
        if group is None or group.blame():
            rank = "" if group is None else f"rank {group.rank}: "
            err(f"error: {rank}{error.message}\nhelp: {error.help}")
        return UNFIT if isinstance(error, MachineUnfit) else FAILED
    return STOPPED if status == "stopped" else DONE


def _same_samples(plan: Plan) -> Manifest:
    """The plan's list of samples, from the run folder. Raises RunFailed if it is not there."""
    from runtime.errors import RunFailed

    path = lock_path(Path(plan.run_folder)).parent / MANIFEST
    why = "it is another one"
    try:
        manifest = Manifest.load(path)
        if manifest.digest == plan.manifest:
            return manifest
    except (OSError, ManifestDamaged) as error:
        why = str(error)
    raise RunFailed(
        f"{path} is not the list of samples that the plan was made for: {why}",
        help="all machines must see the same run folder",
    )


def main(arguments: list[str]) -> int:
    """See the module; returns the exit code."""
    prepare()
    map_by_pages()
    number_by_bus()
    _end_with_parent()
    folder, rank = Path(arguments[0]), int(os.environ["RANK"])
    try:
        return _work(folder, rank)
    except KeyboardInterrupt:
        return STOPPED
    except Exception:
        _write(folder / failed_file(rank), {"kind": "bug", "message": traceback.format_exc()})
        return BUG


def _work(folder: Path, rank: int) -> int:
    execute = _execute()
    from runtime.errors import RunFailed
    from runtime.events import Silent
    from runtime.ranks import join

    plan, manifest = lock.read(folder / PLAN), Manifest.load(folder / MANIFEST)
    recipe = (folder / RECIPE).read_text(encoding="utf-8")
    group: Group | None = None
    try:
        group = join()
        if rank == 0:
            outcome = shown(plan, manifest, recipe, group)
        else:
            outcome = execute(plan, manifest, Silent(), ranks=group)
    except RunFailed as error:
        _write(folder / failed_file(rank), told(error))
        if group is not None:
            group.fail()
        return FAILED
    if rank == 0:
        found = {"status": outcome.status, "step": outcome.step, "measured": outcome.measured}
        result = None if outcome.result is None else str(outcome.result)
        _write(folder / OUTCOME, {**found, "result": result})
    return STOPPED if outcome.status == "stopped" else DONE


def told(error: Any) -> dict[str, Any]:
    """A RunFailed in plain values."""
    from runtime.errors import InUse, MachineUnfit, OutOfMemory, PlanChanged
    from runtime.ranks import RanksLost

    kinds = (PlanChanged, OutOfMemory, MachineUnfit, RanksLost, InUse)
    kind = next((k.__name__ for k in kinds if isinstance(error, k)), "RunFailed")
    found = {"kind": kind, "message": error.message, "help": error.help}
    extra = {n: getattr(error, n) for n in ("changes", "phase", "on_host") if hasattr(error, n)}
    return {**found, **extra}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Beside and renamed: it is there whole or not at all."""
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(content), encoding="utf-8")
    beside.replace(path)


def _end_with_parent() -> None:
    """End at once when the other end of stdin is closed: its process is gone, however it ended."""

    def wait() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os._exit(FAILED)

    threading.Thread(target=wait, name="parent", daemon=True).start()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # connections to ranks that are gone would keep it waiting
