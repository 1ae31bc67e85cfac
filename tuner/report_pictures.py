"""Validation pictures for the report: a slider over the steps beside the untrained model's.

A slider is a row of radio buttons (an arrow key moves on) that a style sheet turns into one: a page
without a script can't do harm, and works where scripts are not let in.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from attrs import frozen

from tuner.run_data import Drawn, RunData

MAX_STEPS = 16  # shown for one prompt; the last always is. report.css has a rule for each
MAX_EDGE = 448  # pixels of an embedded picture
WHOLE_BYTES = 40_000  # a PNG up to this size is embedded as it is
TINY = 160  # pixels; smaller pictures are enlarged without blur
WIDE_EDGE = 256  # pixels; from here on a picture gets more room


@frozen
class Subject:
    """What is drawn again and again while a run goes on."""

    name: str  # of the prompt
    width: int
    height: int


def sliders(run: RunData) -> list[str]:
    """One block of HTML for each prompt and size."""
    found = drawn_by(run)
    return [_slider(run, number, key, found[key]) for number, key in enumerate(ordered(run, found))]


def drawn_by(run: RunData) -> dict[Subject, dict[int, list[Drawn]]]:
    """All pictures of a run by subject and step."""
    found: dict[Subject, dict[int, list[Drawn]]] = {}
    for drawn in run.pictures:
        row = found.setdefault(Subject(drawn.name, drawn.width, drawn.height), {})
        row.setdefault(drawn.step, []).append(drawn)
    return found


def ordered(run: RunData, subjects: Iterable[Subject]) -> list[Subject]:
    """The subjects in the order of the plan's prompts."""
    prompts = run.plan.validation.prompts if run.plan else ()
    order = {prompt.name: n for n, prompt in enumerate(prompts)}
    return sorted(
        subjects, key=lambda s: (order.get(s.name, len(order)), s.name, s.width, s.height)
    )


def chosen(steps: Iterable[int]) -> list[int]:
    """At most `MAX_STEPS` of the steps, evenly spread, the first and the last among them."""
    every = sorted(steps)
    if len(every) <= MAX_STEPS:
        return every
    last = len(every) - 1
    return [every[round(i * last / (MAX_STEPS - 1))] for i in range(MAX_STEPS)]


def embedded(path: Path) -> str:
    """A picture as a `data:` address, made smaller where it is large; "" if it can't be read."""
    from PIL import Image

    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if len(content) <= WHOLE_BYTES and image.format == "PNG":
                return _address("png", content)
            image.thumbnail((MAX_EDGE, MAX_EDGE))
            small = io.BytesIO()
            image.convert("RGB").save(small, "jpeg", quality=86)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return _address("jpeg", small.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def heading(runs: Sequence[RunData], subject: Subject) -> str:
    """A subject's name, its size where the runs draw it in several, and its prompt."""
    sizes = {
        (drawn.width, drawn.height)
        for run in runs
        for drawn in run.pictures
        if drawn.name == subject.name
    }
    size = f" {subject.width} x {subject.height}" if len(sizes) > 1 else ""
    texts = [
        p.text for r in runs if r.plan for p in r.plan.validation.prompts if p.name == subject.name
    ]
    spoken = f"<p class='small caption'>{escape(texts[0])}</p>" if texts else ""
    return f"<h3>{escape(subject.name)}{size}</h3>{spoken}"


def _slider(
    run: RunData, number: int, subject: Subject, by_step: Mapping[int, Sequence[Drawn]]
) -> str:
    base = _frame(run, subject, 0, by_step[0], " class=base") if 0 in by_step else ""
    steps = chosen(step for step in by_step if step)
    frames = "".join(_frame(run, subject, step, by_step[step]) for step in steps)
    buttons = ""
    if len(steps) > 1:
        buttons = "".join(
            f'<input type="radio" name="slider-{number}" aria-label="Step {step:,}"'
            f"{' checked' if step == steps[-1] else ''}>"
            for step in steps
        )
    wide = " wide" if max(subject.width, subject.height) >= WIDE_EDGE else ""
    return (
        f'{heading([run], subject)}<div class="slider{wide}" '
        f'style="grid-template-columns:repeat({max(len(steps), 1)},minmax(0,1fr))">{buttons}'
        f'<div class="pair">{base}<div class="frames">{frames}</div></div></div>'
    )


def _frame(
    run: RunData, subject: Subject, step: int, pictures: Sequence[Drawn], kind: str = ""
) -> str:
    title = "Untrained" if step == 0 else f"Step {step:,}"
    score = run.scores.get(step, {}).get("prompts", {})
    points = score.get(subject.name) if isinstance(score, Mapping) else None
    caption = title + (f" &middot; {points:.0%}" if isinstance(points, int | float) else "")
    return (
        f"<figure{kind}>{mosaic(subject, title, pictures)}<figcaption>{caption}</figcaption>"
        "</figure>"
    )


def mosaic(subject: Subject, title: str, pictures: Sequence[Drawn]) -> str:
    """The pictures of one subject and step, by seed, in a square as far as they fill one."""
    images = []
    for drawn in sorted(pictures, key=lambda drawn: drawn.seed):
        address = embedded(drawn.path)
        alt = escape(f"{subject.name}, {title.lower()}, seed {drawn.seed}", quote=True)
        if address:
            images.append(f'<img src="{address}" alt="{alt}" loading="lazy">')
    across = math.ceil(math.sqrt(len(images)))
    tiny = " tiny" if max(subject.width, subject.height) < TINY else ""
    return (
        f'<div class="mosaic{tiny}" style="grid-template-columns:repeat({max(across, 1)},1fr)">'
        f"{''.join(images)}</div>"
    )
