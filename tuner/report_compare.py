"""`tuner report RUN RUN...`: several runs on one page, that needs no network either."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from compiler.plan import Plan
from tuner.charts import COLOURS, moving_average, overlay
from tuner.diff import ABSENT, FEW, FOLDED, differences, value_text
from tuner.exits import DONE, FAILED, REFUSED
from tuner.formats import duration, number
from tuner.html import document, table
from tuner.judged import judged_by, judged_note, judged_title
from tuner.report import is_run
from tuner.report_memory import measured_bytes
from tuner.report_pictures import Subject, drawn_by, heading, mosaic, ordered
from tuner.run_data import RunData, read_run
from tuner.screen import err, out

COMPARISON = "comparison.html"


def compare(folders: Sequence[Path], path: Path | None = None) -> int:
    """Write the page to `path`, by default `comparison.html` here, and say where it is."""
    if False in [is_run(folder) for folder in folders]:  # each fault is told
        return REFUSED
    if len({folder.resolve() for folder in folders}) < len(folders):
        err("error: a run is given twice")
        return REFUSED
    path = path or Path(COMPARISON)
    try:
        path.write_text(page([read_run(folder) for folder in folders]), encoding="utf-8")
    except OSError as error:
        err(f"error: `{path}` can't be written: {error.strerror or error}")
        return FAILED
    out(str(path))
    return DONE


def page(runs: Sequence[RunData]) -> str:
    """The whole document."""
    names = titles(runs)
    body = (
        f"{_header(names)}<main>{_facts(runs, names)}{_curves(runs)}{_differences(runs, names)}"
        f"{_pictures(runs, names)}</main>"
    )
    return document(f"{' / '.join(names)} - tuner report", body, "report")


def titles(runs: Sequence[RunData]) -> list[str]:
    """Each run's name, and its folder where several are called alike."""
    names = [run.name for run in runs]
    return [
        f"{name} ({run.folder})" if names.count(name) > 1 else name
        for run, name in zip(runs, names, strict=True)
    ]


def _header(names: Sequence[str]) -> str:
    legend = "".join(
        f'<li><i class="run-{place % COLOURS}"></i>{escape(name)}</li>'
        for place, name in enumerate(names)
    )
    return (
        f'<header><div class="title"><h1>{len(names)} runs</h1></div>'
        f'<ul class="legend">{legend}</ul></header>'
    )


def _facts(runs: Sequence[RunData], names: Sequence[str]) -> str:
    rows = [(escape(name), *_figures(run)) for run, name in zip(runs, names, strict=True)]
    heads = ("Step", "Loss", "Score", "Time", "A step", "Peak memory")
    made = table((("Run", ""), *((head, "number") for head in heads)), rows, "glance")
    return f"<h2>At a glance</h2>{made}"


def _figures(run: RunData) -> tuple[str, ...]:
    """Step, smoothed loss, score, training time, seconds a step, peak memory."""
    losses, seconds = run.series("loss"), [value for _, value in run.series("seconds")]
    total = f" of {run.plan.steps.total:,}" if run.plan else ""
    score = run.scores[max(run.scores)]["mean"] if run.scores else None
    peak = max(measured_bytes(run.measured).values(), default=0)
    return (
        f"{run.step:,}{total}",
        f"{moving_average(losses)[-1][1]:.3g}" if losses else ABSENT,
        f"{score:.0%}" if isinstance(score, int | float) else ABSENT,
        duration(sum(seconds)) if seconds else ABSENT,
        f"{sum(seconds) / len(seconds):.2g} s" if seconds else ABSENT,
        f"{peak / 2**30:.2f} GiB" if peak else ABSENT,
    )


def _curves(runs: Sequence[RunData]) -> str:
    def lines(key: str) -> list[list[tuple[float, float]]]:
        return [run.series(key) for run in runs]

    drawn = "".join(
        (
            overlay("Loss", lines("loss"), note="smoothed", smooth=True),
            overlay("Learning rate", lines("lr"), spell=number),
            overlay("Gradient norm", lines("grad_norm"), note="smoothed", smooth=True),
            overlay("Seconds a step", lines("seconds"), note="smoothed", smooth=True),
            *(
                overlay(judged_title(key), lines(key), note=judged_note(key))
                for key in judged_by([row for run in runs for row in run.metrics])
            ),
        )
    )
    return f"<h2>Curves</h2><div class='charts'>{drawn}</div>" if drawn else ""


def _differences(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """Every key in which a run differs from the first one, with the value of each."""
    if runs[0].plan is None:
        return ""
    found = [_against(runs[0].plan, run.plan) for run in runs[1:]]
    keys = dict.fromkeys(key for one in found for key in one)
    if not keys:
        return "<h2>Differences</h2><p class='soft'>All of them do the same.</p>"
    rows = []
    for key in keys:
        first = next(one[key] for one in found if key in one)
        values = [first[0], *(one[key][1] if key in one else first[0] for one in found)]
        mark = "!" if any(one[key][2] for one in found if key in one) else ""
        cells = [f"<code>{escape(value)}</code>" for value in values]
        rows.append((mark, f"<code>{escape(key)}</code>", *cells))
    heads = (("", "tight"), ("Key", ""), *((escape(name), "") for name in names))
    words = "What alters the trained weights is marked with an exclamation mark."
    return f"<h2>Differences</h2><p class='soft small'>{words}</p>{table(heads, rows, 'differ')}"


def _against(first: Plan, other: Plan | None) -> dict[str, tuple[str, str, bool]]:
    """Key -> (value in the first plan, in the other, whether it alters the weights)."""
    if other is None:
        return {}
    every = [d for d in differences(first, other) if d.key not in ("name", "run_folder")]
    folded = [d for d in every if d.key.startswith(FOLDED)]
    kept = [d for d in every if d not in folded or len(folded) <= FEW]
    found = {d.key: (value_text(d.old), value_text(d.new), d.alters_trajectory) for d in kept}
    if len(kept) < len(every):
        found[f"{FOLDED}*"] = ("its own", f"{len(folded)} entries differ", True)
    return found


def _pictures(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """The last pictures of each prompt and size, run beside run."""
    drawn = [drawn_by(run) for run in runs]
    subjects: dict[Subject, None] = {}
    for run, found in zip(runs, drawn, strict=True):
        subjects |= dict.fromkeys(ordered(run, found))
    blocks = []
    for subject in subjects:
        figures = []
        for found, name in zip(drawn, names, strict=True):
            if subject in found:
                step = max(found[subject])
                caption = f"{escape(name)} &middot; step {step:,}"
                shown = mosaic(subject, f"{name}, step {step}", found[subject][step])
                figures.append(f"<figure>{shown}<figcaption>{caption}</figcaption></figure>")
        blocks.append(f'{heading(runs, subject)}<div class="side">{"".join(figures)}</div>')
    words = "<p class='soft'>The same prompts and seeds, each run at its last pictures.</p>"
    return f"<h2>Pictures</h2>{words}{''.join(blocks)}" if blocks else ""
