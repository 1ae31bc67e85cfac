"""`tuner run`: compile, execute, report. Decides nothing about the training itself."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from compiler import lock
from compiler.data.manifest import Manifest, ManifestDamaged
from compiler.optimizers import OPTIMIZERS
from compiler.plan import Plan, lock_path
from tuner.exits import DONE, FAILED, REFUSED, STOPPED, UNFIT
from tuner.screen import err, out
from tuner.slurm import adopt
from tuner.worker import BadEnvironment, follow, leading, seat

if TYPE_CHECKING:
    from compiler.costs import Outlook
    from runtime.errors import PlanChanged, RunFailed
    from runtime.execute import Outcome
    from tuner.worker import Seat

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # read when the libraries are imported
MANIFEST = "manifest.jsonl"  # beside plan.lock.toml: the list of samples that it was made for
LOCK_SUFFIX = ".lock.toml"
# What a begun run can go on with although it differs: nothing that a checkpoint's shape rests on.
ACCEPTABLE = (
    "optimizer.lr",
    "optimizer.arguments",
    "schedule",
    "steps",
    "sharing",
    "objective",
    "max_grad_norm",
    "speed",
    "threads",
)


@frozen(kw_only=True)
class Job:
    """What is to be run."""

    plan: Plan
    manifest: Manifest
    recipe: str  # its text; "" where a saved plan is run
    outlook: Outlook | None = None  # its cost; None where a saved plan is run
    path: Path | None = None  # of the recipe, with its overrides; None where a saved plan is run
    overrides: Sequence[str] = ()
    seat: Seat | None = None  # where another launcher started this process among others


def run_recipe(
    path: Path,
    overrides: Sequence[str],
    *,
    accepted: Sequence[str],
    strict: bool,
    offline: bool = False,
) -> int:
    """Run a recipe or a saved plan; returns the exit code.

    The compiler never asks a network. With `offline` the libraries that load the base don't either.
    """
    if offline:
        os.environ |= dict.fromkeys(OFFLINE, "1")
    adopt(os.environ)
    try:
        place = seat()
    except BadEnvironment as error:
        return _refused(f"{error}", "`torchrun` sets them all; without a launcher unset them")
    if place is not None and place.rank > 0:
        return follow()
    if place is None:
        return _compiled_and_run(path, overrides, accepted, strict, offline, None)
    with leading() as ending:
        return ending(_compiled_and_run(path, overrides, accepted, strict, offline, place))


def _compiled_and_run(
    path: Path,
    overrides: Sequence[str],
    accepted: Sequence[str],
    strict: bool,
    offline: bool,
    place: Seat | None,
) -> int:
    if path.name.endswith(LOCK_SUFFIX):
        job = _from_lock(path, overrides)
    else:
        job = _from_recipe(path, overrides, strict=strict, offline=offline)
    return job if isinstance(job, int) else _run(evolve(job, seat=place), accepted)


def _from_recipe(path: Path, overrides: Sequence[str], *, strict: bool, offline: bool) -> Job | int:
    from runtime.errors import MachineUnfit, RunFailed
    from tuner.compiling import compile_here, exit_code, judged, show_diagnostics
    from tuner.copying import compile_copied
    from tuner.next_rung import gone_down

    try:
        compiled = compile_copied(path, overrides, offline=offline)
    except RunFailed as error:
        return _failed(error, UNFIT if isinstance(error, MachineUnfit) else FAILED)
    lower = gone_down(compiled.plan)
    if lower is not None:
        overrides = [*overrides, *lower.overrides]
        compiled = compile_here(path, overrides, train_below=lower.train_below)
    diagnostics = judged(compiled, strict=strict)
    show_diagnostics(diagnostics, compiled, str(path))
    code = exit_code(diagnostics)
    if code != DONE:
        return code
    assert compiled.plan is not None and compiled.manifest is not None
    text = path.read_text(encoding="utf-8-sig")
    return Job(
        plan=compiled.plan,
        manifest=compiled.manifest,
        recipe=text,
        outlook=compiled.outlook,
        path=path,
        overrides=tuple(overrides),
    )


def _from_lock(path: Path, overrides: Sequence[str]) -> Job | int:
    """A saved plan with its list of samples, which must be the one that it names."""
    if overrides:
        return _refused(f"`--set` can't change a saved plan (`{path}`)", "run the recipe instead")
    try:
        plan = lock.read(path)
        manifest = Manifest.load(path.parent / MANIFEST)
    except (lock.LockError, ManifestDamaged, OSError) as error:
        return _refused(f"`{path}` can't be run: {error}", "run the recipe instead")
    if manifest.digest != plan.manifest:
        return _refused(
            f"{path.parent / MANIFEST} is not the list of samples that `{path}` was made for",
            "run the recipe instead",
        )
    return Job(plan=_where_it_lies(plan, path.parent), manifest=manifest, recipe="")


def _where_it_lies(plan: Plan, folder: Path) -> Plan:
    """A run that was moved or copied goes on in the folder where its plan lies now. A plan that was
    only saved, in no run's folder, names the one to make."""
    from runtime.folder import LOCK

    here = folder.resolve()
    if not (folder / LOCK).exists() or here == Path(plan.run_folder).resolve():
        return plan
    err(f"note: this run was begun in {plan.run_folder}; it goes on in {here}, and only there")
    return evolve(plan, run_folder=str(here))


def _refused(message: str, help: str) -> int:
    err(f"error: {message}\nhelp: {help}")
    return REFUSED


def _run(job: Job, accepted: Sequence[str]) -> int:
    from runtime.errors import InUse, MachineUnfit, OutOfMemory, PlanChanged, RunFailed
    from tuner.next_rung import next_rung
    from tuner.plan_view import summary

    err(summary(job.plan, job.outlook))
    if job.seat is not None and job.seat.count != job.plan.steps.ranks:
        return _wrong_count(job.plan, job.seat.count)
    below: Job | None = None
    outcome: Outcome | None = None
    try:
        outcome = _execute(job)
    except PlanChanged as error:
        if not _accept(job.plan, error, accepted, job.recipe):
            return _changed(job.plan, error)
        return _run(job, ())
    except InUse as error:
        return _failed(error, FAILED)
    except OutOfMemory as error:
        below = next_rung(job, error) if job.seat is None else None
        if below is None:
            _report(job.plan)
            return _failed(error, FAILED)
    except MachineUnfit as error:
        return _failed(error, UNFIT)
    except RunFailed as error:
        _report(job.plan)
        return _failed(error, FAILED)
    if below is not None:  # out of the exception, which holds what the run had on the device
        from runtime.out_of_memory import let_go

        let_go()
        return _run(below, ())
    assert outcome is not None
    if outcome.status != "already":
        _keep_measured(job.plan, outcome)
    return _ended(outcome, _report(job.plan))


def _wrong_count(plan: Plan, count: int) -> int:
    return _refused(
        f"{count} processes were started (WORLD_SIZE), and the plan is for {plan.steps.ranks}",
        f"set launch.devices={count}, start {plan.steps.ranks} of them, or run `tuner run` without "
        "a launcher: it starts them itself",
    )


def _execute(job: Job) -> Outcome:
    """Execute the plan, in a process for each of several devices; Ctrl-C anywhere in it ends in an
    outcome, not in an exception."""
    _keep_manifest(job)
    _note_copies(job)
    if job.seat is not None:
        from tuner.worker import lead

        return lead(job.plan, job.manifest, job.recipe)
    if job.plan.steps.ranks > 1:
        from tuner.launch import launch

        return launch(job.plan, job.manifest, job.recipe)
    from runtime.ranks import ALONE
    from tuner.worker import shown

    return shown(job.plan, job.manifest, job.recipe, ALONE)


def _keep_manifest(job: Job) -> None:
    """Save the list of samples beside the plan, so that `tuner run plan.lock.toml` has it. One of
    another plan stays where that is at work, or has trained."""
    from runtime.errors import RunFailed
    from runtime.folder import idle

    folder = Path(job.plan.run_folder)
    if not _is_new(job.plan):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with idle(folder) as free:
            if free and _is_new(job.plan):
                lock_path(folder).unlink(missing_ok=True)  # of the other list
                job.manifest.save(folder / MANIFEST)
    except OSError as error:
        raise RunFailed(f"can't write the run folder: {error}") from error


def _is_new(plan: Plan) -> bool:
    """Whether the run folder has yet to be given the plan's list of samples: it has none, or that
    of another plan, which has trained nothing."""
    from runtime.folder import has_trained

    folder = Path(plan.run_folder)
    if not lock_path(folder).exists():
        return not ((folder / MANIFEST).exists() and has_trained(folder))
    try:
        return lock.read(lock_path(folder)).manifest != plan.manifest and not has_trained(folder)
    except lock.LockError:  # it is refused
        return False


def _note_copies(job: Job) -> None:
    """Note in the user's cache folder that the run reads what was copied there."""
    from compiler.home import default_cache
    from runtime.data.copies import note_run

    note_run(Path(job.plan.run_folder), default_cache())


def _accept(plan: Plan, error: PlanChanged, accepted: Sequence[str], recipe: str = "") -> bool:
    """Let the run go on with the changed plan if the person accepts each change, and a checkpoint
    can bear it."""
    from runtime import folder

    keys = [key for key, _, _ in error.changes]
    if not all(below(key, accepted) and _acceptable(plan, key) for key in keys):
        return False
    if _at_its_end(plan):
        return False
    try:
        folder.accept(plan, recipe)
    except OSError as fault:
        err(f"error: can't write the run folder: {fault}")
        return False
    return True


def _acceptable(plan: Plan, key: str) -> bool:
    """Whether a checkpoint can bear another value of the plan's `key`."""
    shaping = [f"optimizer.arguments.{name}" for name in OPTIMIZERS[plan.optimizer.name].shaping]
    return below(key, ACCEPTABLE) and not below(key, shaping)


def _at_its_end(plan: Plan) -> str:
    """Why the begun run can't be gone on with to the end of `plan`; "" if it can."""
    from runtime.folder import read_measured
    from runtime.saved import latest, step_of

    folder, total = Path(plan.run_folder), plan.steps.total
    newest = latest(folder / "checkpoints")
    done = 0 if newest is None else step_of(newest)
    finished = read_measured(folder) is not None
    if finished and newest is None:
        return "it is finished, and has no checkpoint left to go on from"
    if total < done:
        return f"{done:,} steps are done, and it can't go back to {total:,}"
    if finished and total == done:
        return f"it is finished: it can only be given more steps than {done:,}"
    return ""


def below(key: str, names: Sequence[str]) -> bool:
    """Whether a key of the plan is one of `names` or lies below it; `train.` may stand before."""
    bare = [name.removeprefix("train.") for name in names]
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in bare)


def _changed(plan: Plan, error: PlanChanged) -> int:
    err(f"error: {error.message}")
    keys = {key: old for key, old, _ in error.changes}
    help = error.help
    if all(_acceptable(plan, key) for key in keys):
        if why := _at_its_end(plan):
            help += f";\n  to accept that would not help: {why}"
        else:
            options = " ".join(f"--accept-change {key}" for key in keys)
            help += f";\n  or go on all the same with {options}"
    if "threads" in keys:
        help += f";\n  `--set launch.threads={keys['threads']}` splits sums as it was begun"
    err(f"help: {help}")
    return REFUSED


def _failed(error: RunFailed, code: int) -> int:
    err(f"error: {error.message}")
    if error.help:
        err(f"help: {error.help}")
    return code


def _report(plan: Plan) -> Path | None:
    """Write the report; that it can't be written is said, but spoils no run."""
    from runtime.files import write_whole
    from runtime.machine import facts
    from tuner.report import write_report

    folder = Path(plan.run_folder)
    try:
        environment = json.dumps(facts(folder), indent=2) + "\n"
        write_whole(folder / "environment.json", environment)
        return write_report(folder)
    except OSError as error:
        err(f"warning: the report can't be written: {error}")
        return None


def _keep_measured(plan: Plan, outcome: Outcome) -> None:
    """Remember how fast the run was and what it needed, for the next plan; that it can't be kept
    spoils nothing."""
    from contextlib import suppress

    from compiler.home import default_cache
    from runtime.machine import look
    from runtime.memory import corrections
    from runtime.speeds import SPEEDS, remember

    with suppress(OSError):
        remember(default_cache() / SPEEDS, plan, look())
        memory = outcome.measured.get("memory", {})
        for name, ratio in corrections.unlikely(memory).items():
            err(
                f"note: `{name}` needed {ratio:.1f} times the memory that was planned: later "
                "plans are not corrected by so much"
            )
        corrections.remember(default_cache() / corrections.CORRECTIONS, plan, look(), memory)


def _ended(outcome: Outcome, report: Path | None) -> int:
    """Say where things are."""
    if outcome.status == "stopped":
        err(f"stopped after step {outcome.step:,}; run it again to go on from the last checkpoint")
        return STOPPED
    rows = [("result", outcome.result), ("report", report), ("run", outcome.run_folder)]
    out("\n".join(f"{name:<8}{path}" for name, path in rows if path is not None))
    return DONE
