"""`tuner status`: what a run is doing or how it ended, from its folder alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from attrs import asdict, frozen

from compiler.adapters import result_name
from compiler.keeping import CLIP_SCORE, LOSS, best_of, is_finite
from compiler.plan import Plan
from runtime.folder import is_held
from runtime.saved import complete, latest, read_state, step_of
from tuner.curve import sparkline
from tuner.eta import RECENT, Eta
from tuner.exits import DONE, REFUSED
from tuner.formats import counted, duration, rate, size
from tuner.layout import columns
from tuner.lines import TITLES, pace
from tuner.noting import NOTE
from tuner.run_data import RunData, read_run
from tuner.screen import err, out

STATES: Mapping[str, str] = {
    "running": "running",
    "finished": "finished",
    "stopped": "not running; `tuner run` goes on from the last checkpoint",
    "killed": "not running: it was killed; `tuner run` goes on from the last checkpoint",
    "waiting": "not begun",
}


@frozen(kw_only=True)
class Status:
    """What a run folder tells of its run. What it does not tell is None."""

    folder: str
    name: str
    state: str  # a key of STATES
    phase: str | None  # as events name it; of a killed run the one that it was in
    phase_done: int | None
    phase_total: int | None  # 0: not known
    step: int  # updates done
    steps: int  # in all
    epoch: int | None
    epochs: int
    loss: float | None  # of the last step
    loss_recent: float | None  # mean of the last hundred steps
    evaluation_losses: list[tuple[int, float]]  # (step, loss of what is held out)
    clip_scores: list[tuple[int, float]]  # (step, mean over the validation pictures)
    best: int | None  # step of the best checkpoint, where the plan keeps it
    grad_norm: float | None
    lr: float | None
    seconds_per_step: float | None  # mean of the last hundred
    seconds_left: float | None  # of a run that goes on
    seconds_since_step: float | None
    checkpoint: int | None  # its step
    result: str | None  # folder of the weights
    planned_bytes: int | None  # device memory, at its peak
    measured_bytes: int | None  # the same, once the run is finished
    process_bytes: int | None  # host memory of the process now (Linux)
    pid: int | None


def show_status(folder: Path, *, as_json: bool) -> int:
    """Say what the run in `folder` does; returns the exit code."""
    if not folder.is_dir():
        return _refused(f"there is no folder `{folder}`")
    run = read_run(folder)
    if run.plan is None:
        return _refused(f"`{folder}` is no run folder: {run.plan_fault}")
    found = status(run, run.plan)
    if as_json:
        out(json.dumps({"format_version": 1, **asdict(found)}, indent=2))
    else:
        out("\n".join(_lines(found)))
    return DONE


def _refused(message: str) -> int:
    err(f"error: {message}\nhelp: name the folder of a run, which holds plan.lock.toml")
    return REFUSED


def status(run: RunData, plan: Plan, now: float | None = None) -> Status:
    """What the folder tells at the time `now` (seconds since 1970; None: the clock's)."""
    now = time.time() if now is None else now
    note = _note(run.folder)
    state = _state(run, note)
    known = note if state in ("running", "killed") else {}
    last: Mapping[str, Any] = next((row for row in reversed(run.metrics) if "loss" in row), {})
    checkpoint = _checkpoint(run.folder)
    step = max(run.step, checkpoint or 0) if state != "finished" else plan.steps.total
    recent = run.metrics[-RECENT:]
    eta = _eta(plan, recent)
    result = run.folder / result_name(plan.adapter)
    pid = _whole(known.get("pid")) if state == "running" else None
    return Status(
        folder=str(run.folder),
        name=plan.name,
        state=state,
        phase=known.get("phase"),
        phase_done=_whole(known.get("done")) if known.get("phase") != "train" else step,
        phase_total=_whole(known.get("total")),
        step=step,
        steps=plan.steps.total,
        epoch=_whole(last.get("epoch")),
        epochs=plan.steps.epochs,
        loss=_number(last.get("loss")),
        loss_recent=_mean(recent, "loss"),
        evaluation_losses=_series(run, LOSS),
        clip_scores=_series(run, CLIP_SCORE),
        best=_best(run, plan),
        grad_norm=_number(last.get("grad_norm")),
        lr=_number(last.get("lr")),
        seconds_per_step=eta.step_seconds,
        seconds_left=eta.seconds_left() if state == "running" else None,
        seconds_since_step=_age(run.folder / "metrics.jsonl", now) if run.metrics else None,
        checkpoint=checkpoint,
        result=str(result) if result.is_dir() else None,
        planned_bytes=max((p.device_bytes for p in plan.memory.phases), default=None),
        measured_bytes=_measured(run),
        process_bytes=_resident(pid),
        pid=pid,
    )


def _state(run: RunData, note: Mapping[str, Any]) -> str:
    if is_held(run.folder):
        return "running"
    if run.measured:
        return "finished"
    if note:
        return "killed"
    return "stopped" if run.metrics or _checkpoint(run.folder) is not None else "waiting"


def _note(folder: Path) -> Mapping[str, Any]:
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _checkpoint(folder: Path) -> int | None:
    saved = latest(folder / "checkpoints")
    return None if saved is None else _whole(read_state(saved).get("step"))


def _series(run: RunData, key: str) -> list[tuple[int, float]]:
    return [(int(step), value) for step, value in run.series(key)]


def _best(run: RunData, plan: Plan) -> int | None:
    if not plan.checkpoints.best:
        return None
    steps = [step_of(folder) for folder in complete(run.folder / "checkpoints")]
    return best_of(run.metrics, plan.checkpoints.best, steps)


def _eta(plan: Plan, recent: Sequence[Mapping[str, Any]]) -> Eta:
    eta = Eta(plan)
    for row in recent:
        eta.step(row)
    return eta


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [value for row in rows if (value := _number(row.get(key))) is not None]
    return fmean(values) if values else None


def _measured(run: RunData) -> int | None:
    phases = run.measured.get("memory")
    rows = phases.values() if isinstance(phases, dict) else ()
    found = [_whole(row.get("measured_bytes")) for row in rows if isinstance(row, dict)]
    return max((value for value in found if value is not None), default=None)


def _resident(pid: int | None) -> int | None:
    """Host memory that a process holds, in bytes (Linux)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        line = next(line for line in text.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _age(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    return float(value) if is_finite(value) else None


def _lines(found: Status) -> list[str]:
    rows = [
        ("run", f"{found.name} ({found.folder})"),
        ("state", STATES[found.state]),
        ("phase", _phase(found)),
        ("step", _step(found)),
        ("loss", _loss(found)),
        ("evaluation", _judged(found.evaluation_losses, min)),
        ("clip score", _judged(found.clip_scores, max)),
        ("rate", _rate(found)),
        ("left", "" if found.seconds_left is None else f"about {duration(found.seconds_left)}"),
        ("memory", _memory(found)),
        ("saved", _saved(found)),
        ("result", found.result or ""),
    ]
    return columns([(name, text) for name, text in rows if text])


def _phase(found: Status) -> str:
    if found.phase is None:
        return ""
    title = TITLES.get(found.phase, found.phase)
    if not found.phase_total:
        return title
    return f"{title}, {found.phase_done or 0:,} of {found.phase_total:,}"


def _step(found: Status) -> str:
    text = f"{found.step:,} of {counted(found.steps, 'step')}"
    if found.epoch is not None:
        text += f", epoch {found.epoch:,} of {found.epochs:,}"
    if found.state == "running" and found.seconds_since_step is not None:
        text += f", the last one {duration(found.seconds_since_step)} ago"
    return text


def _loss(found: Status) -> str:
    if found.loss is None:
        return ""
    text = f"{found.loss:.3g}"
    if found.loss_recent is not None:
        text += f", {found.loss_recent:.3g} in the mean of recent steps"
    return text if found.grad_norm is None else f"{text}; gradient norm {found.grad_norm:.2g}"


def _judged(points: Sequence[tuple[int, float]], better: Callable[..., float]) -> str:
    """The last value, how it came there, and the best one."""
    if not points:
        return ""
    step, value = points[-1]
    text = f"{value:.4g} at step {step:,}"
    if len(points) > 1:
        best = better(value for _, value in points)
        where = next(step for step, value in points if value == best)
        text += f"; {points[0][1]:.4g} at first, best {best:.4g} at step {where:,}"
        text += f"  {sparkline([value for _, value in points])}"
    return text


def _saved(found: Status) -> str:
    if found.checkpoint is None:
        return ""
    best = "" if found.best is None else f", the best of those kept is that of step {found.best:,}"
    return f"checkpoint of step {found.checkpoint:,}{best}"


def _rate(found: Status) -> str:
    parts = [pace(found.seconds_per_step)]
    if found.lr is not None:
        parts.append(f"learning rate {rate(found.lr)}")
    return ", ".join(filter(None, parts))


def _memory(found: Status) -> str:
    parts = [
        (found.measured_bytes, "on the device at the peak"),
        (found.planned_bytes, "planned"),
        (found.process_bytes, "of host memory now"),
    ]
    return ", ".join(f"{size(value)} {words}" for value, words in parts if value is not None)
