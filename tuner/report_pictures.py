"""Validation pictures for the report: rows of one prompt over the steps, embedded as data."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from tuner.run_data import Drawn, RunData

MAX_COLUMNS = 9  # steps shown for one prompt; the first and the last always are
MAX_EDGE = 448  # pixels of an embedded picture
WHOLE_BYTES = 40_000  # a PNG up to this size is embedded as it is
TINY = 160  # pixels; smaller pictures are enlarged without blur
WIDE_EDGE = 256  # pixels; from here on a picture gets a wider column


def strips(run: RunData) -> list[str]:
    """One block of HTML for each prompt and size, the untrained model's pictures first."""
    steps = chosen({drawn.step for drawn in run.pictures})
    groups: dict[tuple[str, int, int], dict[int, list[Drawn]]] = {}
    for drawn in run.pictures:
        if drawn.step in steps:
            row = groups.setdefault((drawn.name, drawn.width, drawn.height), {})
            row.setdefault(drawn.step, []).append(drawn)
    order = {
        prompt.name: n for n, prompt in enumerate(run.plan.validation.prompts if run.plan else ())
    }
    names = sorted(groups, key=lambda key: (order.get(key[0], len(order)), key))
    return [_strip(run, name, groups[name]) for name in names]


def chosen(steps: Iterable[int]) -> list[int]:
    """At most `MAX_COLUMNS` of the steps, evenly spread, the first and the last among them."""
    every = sorted(steps)
    if len(every) <= MAX_COLUMNS:
        return every
    last = len(every) - 1
    return [every[round(i * last / (MAX_COLUMNS - 1))] for i in range(MAX_COLUMNS)]


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


def _strip(run: RunData, key: tuple[str, int, int], columns: Mapping[int, Sequence[Drawn]]) -> str:
    name, width, height = key
    prompts = (
        {prompt.name: prompt.text for prompt in run.plan.validation.prompts} if run.plan else {}
    )
    figures = [_column(run, name, step, columns[step]) for step in sorted(columns)]
    size = f" {width} x {height}" if _several_sizes(run, name) else ""
    spoken = f" <span class='caption'>{escape(prompts[name])}</span>" if name in prompts else ""
    wide = " wide" if max(width, height) >= WIDE_EDGE else ""
    return (
        f"<h3>{escape(name)}{size}</h3><p class='small'>{spoken}</p>"
        f'<div class="strip{wide}">{"".join(figures)}</div>'
    )


def _several_sizes(run: RunData, name: str) -> bool:
    return len({(drawn.width, drawn.height) for drawn in run.pictures if drawn.name == name}) > 1


def _column(run: RunData, name: str, step: int, pictures: Sequence[Drawn]) -> str:
    title = "Untrained" if step == 0 else f"Step {step:,}"
    score = run.scores.get(step, {}).get("prompts", {})
    points = score.get(name) if isinstance(score, Mapping) else None
    caption = title + (f" &middot; {points:.0%}" if isinstance(points, int | float) else "")
    images = []
    for drawn in sorted(pictures, key=lambda drawn: drawn.seed):
        address = embedded(drawn.path)
        alt = escape(f"{name}, {title.lower()}, seed {drawn.seed}", quote=True)
        if address:
            images.append(f'<img src="{address}" alt="{alt}" loading="lazy">')
    across = math.ceil(math.sqrt(len(images)))
    tiny = " tiny" if max(pictures[0].width, pictures[0].height) < TINY else ""
    return (
        f"<figure{' class=base' if step == 0 else ''}>"
        f'<div class="mosaic{tiny}" style="grid-template-columns:repeat({max(across, 1)},1fr)">'
        f"{''.join(images)}</div><figcaption>{caption}</figcaption></figure>"
    )
