"""`report.html`: what a run did, in one file that needs no network and no program but a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from compiler.adapters import described
from compiler.keeping import CLIP_SCORE, LOSS, best_of
from compiler.plan import Plan
from compiler.secrets import shown_address, without_webhook
from runtime.files import write_whole
from runtime.saved import complete, step_of
from tuner.charts import chart, moving_average
from tuner.exits import DONE, FAILED, REFUSED
from tuner.formats import amount, counted, duration, number, size
from tuner.html import document, table
from tuner.judged import judged_by, judged_note, judged_title
from tuner.plan_view import text as plan_text
from tuner.plan_view import whole_parameters
from tuner.report_data import contact_sheet
from tuner.report_events import events
from tuner.report_memory import bar, memory_table
from tuner.report_pictures import sliders
from tuner.run_data import RunData, read_run
from tuner.screen import err, out

REPORT = "report.html"


def rewrite_report(folder: Path) -> int:
    """`tuner report RUN`: write the report anew and say where it is."""
    if not is_run(folder):
        return REFUSED
    try:
        out(str(write_report(folder)))
    except OSError as error:
        err(f"error: the report can't be written: {error}")
        return FAILED
    return DONE


def is_run(folder: Path) -> bool:
    """Whether `folder` is one of a run; says so where it is not."""
    if not folder.is_dir():
        err(f"error: there is no folder `{folder}`")
        return False
    if not any((folder / name).exists() for name in ("plan.lock.toml", "metrics.jsonl")):
        err(f"error: `{folder}` is no run folder: it has no plan.lock.toml")
        return False
    return True


def write_report(run_folder: Path) -> Path:
    """Write the report of the run in `run_folder` and return its path.

    What the folder lacks is left out. Raises OSError if the file can't be written.
    """
    path = run_folder / REPORT
    write_whole(path, page(read_run(run_folder)))
    return path


def page(run: RunData) -> str:
    """The whole document."""
    name = run.name
    sections: Sequence[Callable[[RunData], str]] = (
        _score,
        _pictures,
        _curves,
        memory_table,
        _time,
        _data,
        events,
        _settings,
        _details,
    )
    body = f"{_header(run, name)}<main>{''.join(section(run) for section in sections)}</main>"
    return _fit_to_share(document(f"{name} - tuner report", body, "report"), run.plan)


def _fit_to_share(page: str, plan: Plan | None) -> str:
    """The page without the webhook's address, which is a secret, wherever it would stand."""
    address = plan.publish.webhook if plan and plan.publish else ""
    for spelt in (address, escape(address)) if address else ():
        page = page.replace(spelt, escape(shown_address(address)))
    return page


def _header(run: RunData, name: str) -> str:
    plan = run.plan
    if plan is None:
        words = f"<p>There is no plan to read: {escape(run.plan_fault)}</p>"
        return f"<header><h1>{escape(name)}</h1>{words}</header>"
    done = run.step >= plan.steps.total
    status = "finished" if done else f"step {run.step:,} of {plan.steps.total:,}"
    method = "Full fine-tune of"
    if plan.adapter:
        method = f"{described(plan.adapter)} on"
    elif plan.sprint:
        method = "Sprint distillation of"
    return (
        f'<header><div class="title"><h1>{escape(name)}</h1>'
        f'<span class="chip{" done" if done else ""}">{status}</span></div>'
        f"<p>{escape(method)} {escape(plan.model.origin)} "
        f'<span class="soft">({escape(plan.model.family)})</span></p>'
        f'<p class="soft small">Plan <code>{plan.digest[:12]}</code></p>'
        f"{_facts(run, plan)}</header>"
    )


def _facts(run: RunData, plan: Plan) -> str:
    """The figures that a person looks for first."""
    facts = [("Steps", f"{run.step:,}", f"of {plan.steps.total:,}")]
    losses = run.series("loss")
    if losses:
        facts.append(("Loss", f"{moving_average(losses)[-1][1]:.3g}", "smoothed, at the end"))
    for key in (LOSS, CLIP_SCORE):
        if found := run.series(key):
            words = f"from {found[0][1]:.3g}" if len(found) > 1 else f"at step {found[0][0]:,.0f}"
            facts.append((judged_title(key), f"{found[-1][1]:.3g}", words))
    seconds = [value for _, value in run.series("seconds")]
    if seconds:
        mean = sum(seconds) / len(seconds)
        facts.append(("Training", duration(sum(seconds)), f"{mean:.2g} s a step"))
    trainable = plan.memory.counts.get("trainable", 0)
    if trainable:
        whole = whole_parameters(plan)
        words = "parameters, a teacher beside" if plan.sprint else f"of {amount(whole)} parameters"
        facts.append(("Trained", amount(trainable), words))
    if run.skipped:
        facts.append(("Passed over", counted(len(run.skipped), "step"), "with bad numbers"))
    if run.scores:
        first, last = _first_and_last(run)
        facts.append((f"{_measure(run).capitalize()} score", f"{last:.0%}", f"from {first:.0%}"))
    cells = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)} <small>{escape(note)}</small></dd></div>"
        for title, value, note in facts
    )
    return f'<dl class="facts">{cells}</dl>'


def _measure(run: RunData) -> str:
    content = run.scores[max(run.scores)]
    return str(content.get("measure") or content.get("score") or "prompt")


def _first_and_last(run: RunData) -> tuple[float, float]:
    steps = sorted(run.scores)
    return float(run.scores[steps[0]]["mean"]), float(run.scores[steps[-1]]["mean"])


def _score(run: RunData) -> str:
    """Before and after, in words, then prompt by prompt."""
    if not run.scores:
        return ""
    steps = sorted(run.scores)
    first, last = _first_and_last(run)
    before = "before training" if steps[0] == 0 else f"at step {steps[0]:,}"
    sentence = f"{first:.0%} of the pictures show what their prompt asks for"
    if len(steps) > 1:
        sentence = (
            f"{first:.0%} of the pictures showed what their prompt asks for {before}; "
            f"<b>{last:.0%}</b> do after {steps[-1]:,} steps."
        )
    table = ""
    if len(steps) > 1:
        table = _by_group(run, steps[0], steps[-1]) + _by_prompt(run, steps[0], steps[-1])
    return (
        f"<h2>Does it draw what it is asked?</h2><p class='verdict'>{sentence}</p>"
        f"<p class='soft small'>Measure <code>{escape(_measure(run))}</code></p>{table}"
    )


def _by_group(run: RunData, first: int, last: int) -> str:
    """The named groups of prompts, where the recipe has some."""
    before, after = run.scores[first].get("groups"), run.scores[last].get("groups")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping) or not after:
        return ""
    rows = [
        (escape(str(name)), _share(before.get(name)), _share(value))
        for name, value in after.items()
    ]
    return table((("Prompts", ""), ("Before", "number"), ("After", "number")), rows)


def _by_prompt(run: RunData, first: int, last: int) -> str:
    before, after = run.scores[first].get("prompts"), run.scores[last].get("prompts")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return ""
    texts = {p.name: p.text for p in run.plan.validation.prompts} if run.plan else {}
    rows = [
        (escape(str(name)), escape(texts.get(name, "")), _share(before.get(name)), _share(value))
        for name, value in after.items()
    ]
    titles = (("Prompt", ""), ("Text", ""), ("Before", "number"), ("After", "number"))
    open_ = "" if run.scores[last].get("groups") else " open"
    return f"<details{open_}><summary>By prompt</summary>{table(titles, rows)}</details>"


def _share(value: Any) -> str:
    return f"{value:.0%}" if isinstance(value, int | float) else "-"


def _pictures(run: RunData) -> str:
    blocks = sliders(run)
    if not blocks:
        return ""
    return (
        "<h2>Pictures</h2><p class='soft'>The same prompts and seeds, untrained and after so many "
        f"steps: move the slider.</p>{''.join(blocks)}"
    )


def _curves(run: RunData) -> str:
    charts = [
        chart(
            "Loss",
            run.series("loss"),
            note="each step, and smoothed",
            smooth=True,
            marks=run.spikes("loss"),
        ),
        chart("Learning rate", run.series("lr"), spell=number),
        chart(
            "Gradient norm",
            run.series("grad_norm"),
            note="before clipping",
            smooth=True,
            marks=run.spikes("grad_norm"),
        ),
        chart("Seconds a step", run.series("seconds"), smooth=True),
        *_judged(run),
    ]
    drawn = "".join(charts)
    if not drawn:
        return ""
    marked = any(run.spikes(key) for key in ("loss", "grad_norm"))
    key = "<p class='soft small'>Triangles mark values that stand out.</p>" if marked else ""
    return f"<h2>Curves</h2>{key}<div class='charts'>{drawn}</div>"


def _judged(run: RunData) -> Iterator[str]:
    """Curves of what is measured now and then: it has few points, and each counts."""
    for key in judged_by(run.metrics):
        rules = run.plan.checkpoints if run.plan else None
        chosen = best_of(run.metrics, key, _kept(run)) if rules and rules.best == key else None
        note = judged_note(key)
        if chosen is not None:
            note += f"; the triangle marks step {chosen:,}, the best that is kept"
        marks = () if chosen is None else (float(chosen),)
        yield chart(judged_title(key), run.series(key), note=note, marks=marks)


def _kept(run: RunData) -> list[int]:
    return [step_of(folder) for folder in complete(run.folder / "checkpoints")]


def _time(run: RunData) -> str:
    """Where the time of the run went."""
    seconds = run.measured.get("seconds")
    if not isinstance(seconds, Mapping):
        return ""
    spent = {str(k): float(v) for k, v in seconds.items() if isinstance(v, int | float)}
    whole = sum(spent.values())
    if not whole:
        return ""
    rows = [
        (escape(name), bar(round(1000 * value), round(1000 * whole), " measured"), duration(value))
        for name, value in sorted(spent.items(), key=lambda item: -item[1])
    ]
    titles = (("Phase", "tight"), ("", "bars"), ("Time", "number"))
    return f"<h2>Where the time went</h2>{table(titles, rows)}"


def _data(run: RunData) -> str:
    if run.plan is None:
        return ""
    rows = [
        (
            escape(bucket.source),
            f"{bucket.width} x {bucket.height}",
            f"{bucket.images:,}",
            f"{bucket.samples:,}",
            f"{bucket.batches:,}",
        )
        for bucket in run.plan.buckets
    ]
    titles = (
        ("Source", ""),
        ("Bucket", "tight"),
        ("Images", "number"),
        ("Samples an epoch", "number"),
        ("Batches", "number"),
    )
    steps = run.plan.steps
    words = f"{counted(steps.per_epoch, 'step')} an epoch, {counted(steps.total, 'step')} in all"
    return f"<h2>Data</h2><p class='soft'>{words}</p>{table(titles, rows)}{contact_sheet(run)}"


def _settings(run: RunData) -> str:
    if run.plan is None or not run.plan.decisions:
        return ""
    rows = [
        (
            f"<code>{escape(decision.key)}</code>",
            f"<code>{escape(decision.value)}</code>",
            escape(decision.source),
            escape(decision.why),
        )
        for decision in run.plan.decisions
    ]
    titles = (("Key", ""), ("Value", ""), ("From", ""), ("Why", ""))
    optimizer = run.plan.optimizer
    words = (
        f"{optimizer.name}, learning rate {number(optimizer.lr)}; all settings and who gave them"
    )
    made = table(titles, rows, "settings")
    return f"<h2>Settings</h2><details><summary>{escape(words)}</summary>{made}</details>"


def _details(run: RunData) -> str:
    parts = []
    if run.plan is not None:
        parts.append(("Plan", plan_text(run.plan, recipe="recipe.toml")))
    if run.recipe:
        parts.append(("Recipe", without_webhook(run.recipe)))
    blocks = [
        f"<details><summary>{title}</summary><pre>{escape(words)}</pre></details>"
        for title, words in parts
    ]
    environment = _flat(run.environment)
    if environment:
        rows = [(escape(key), f"<code>{escape(value)}</code>") for key, value in environment]
        made = table((("", "tight"), ("", "")), rows)
        blocks.append(f"<details><summary>Environment</summary>{made}</details>")
    return f"<h2>Details</h2>{''.join(blocks)}" if blocks else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as rows of dotted names; bytes are spelt with their unit."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name}.")
        elif name.endswith("_bytes") and isinstance(value, int):
            rows.append((name.removesuffix("_bytes"), size(value)))
        elif isinstance(value, list):
            rows += _flat({str(n): item for n, item in enumerate(value)}, f"{name}.")
        else:
            rows.append((name, str(value)))
    return rows
