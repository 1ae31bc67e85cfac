"""Which pictures to draw by a run's weights, checked against its plan. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import quote

from attrs import frozen

from compiler.families import FAMILIES
from compiler.plan import Device, Plan
from runtime.export.request import Refused, Weights

DEVICES: tuple[Device, ...] = get_args(Device)
LONGEST = 60  # letters of a prompt that a file is called by


@frozen
class Drawing:
    """One picture."""

    prompt: str
    seed: int
    path: Path


@frozen(kw_only=True)
class Wanted:
    """Pictures of one size, drawn in one way."""

    drawings: tuple[Drawing, ...]
    negative: str
    width: int  # pixels
    height: int
    guidance: float
    steps: int
    device: Device | Literal[""]  # "": the run's


def pictures(
    weights: Weights,
    prompts: Sequence[str],
    *,
    negative: str | None = None,
    size: str = "",
    guidance: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    count: int = 1,
    device: str = "",
    out: Path | None = None,
) -> Wanted:
    """What to draw; what is not given is as in the run's validation. Raises Refused.

    `count` pictures of each prompt, with seeds that follow each other. No file that is there is
    written over.
    """
    validation = weights.plan.validation
    place = next((known for known in DEVICES if known == device), None)
    if device and place is None:
        raise Refused(f"unknown device `{device}`", help=f"one of: {', '.join(DEVICES)}")
    if FAMILIES[weights.plan.model.family].refines and not validation.picture:
        raise Refused(
            "this model draws nothing by itself, and the run's validation names no picture",
            help="name one in the recipe's `[validation] picture`",
        )
    width, height = _size(weights.plan, size)
    first = validation.seeds[0] if seed is None and validation.seeds else seed or 0
    folder = out or weights.folder / "drawn" / f"step-{weights.step:06d}"
    wanted = [(prompt, first + number) for prompt in prompts for number in range(count)]
    names = _names(folder, [f"{_short(p)}-{width}x{height}-{s}" for p, s in wanted])
    return Wanted(
        drawings=tuple(Drawing(p, s, path) for (p, s), path in zip(wanted, names, strict=True)),
        negative=validation.negative if negative is None else negative,
        width=width,
        height=height,
        guidance=validation.guidance if guidance is None else guidance,
        steps=validation.steps if steps is None else steps,
        device=place or "",
    )


def _size(plan: Plan, text: str) -> tuple[int, int]:
    if not text:
        sizes = plan.validation.sizes or tuple((b.width, b.height) for b in plan.buckets)
        return sizes[0]
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise Refused(f"`{text}` is no size", help='width and height in pixels: "1024x768"')
    width, height = int(match[1]), int(match[2])
    card = FAMILIES[plan.model.family]
    multiple = card.multiple({k: json.loads(v) for k, v in plan.model.configs.items()})
    fits = [max(multiple, round(edge / multiple) * multiple) for edge in (width, height)]
    if [width, height] != fits:
        raise Refused(
            f"{text}: both edges must be multiples of {multiple} pixels",
            help=f"the nearest size is {fits[0]}x{fits[1]}",
        )
    return width, height


def _short(prompt: str) -> str:
    """A prompt as the name of a file; the run's own pictures are called by their prompt's name."""
    words = " ".join(prompt.split())[:LONGEST].strip() or "empty"
    return quote(words, safe=" ,()+=@")[: 3 * LONGEST]


def _names(folder: Path, stems: Sequence[str]) -> Iterator[Path]:
    """A file for each that is not there, all different."""
    taken: set[Path] = set()
    for stem in stems:
        path, number = folder / f"{stem}.png", 2
        while path in taken or path.exists():
            path, number = folder / f"{stem} ({number}).png", number + 1
        taken.add(path)
        yield path
