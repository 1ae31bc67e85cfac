"""Line charts as inline SVG, readable from a phone to a desktop, in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 24
MAX_POINTS = 360  # bins of a line; more than that no screen shows
COLOURS = 8  # of runs beside each other; more begin anew
TAIL = 0.005  # share of raw values above the frame, so that one spike does not flatten the rest

Point = tuple[float, float]


def chart(
    title: str,
    points: Sequence[Point],
    *,
    note: str = "",
    smooth: bool = False,
    spell: Callable[[float], str] = "{:.3g}".format,
    marks: Sequence[float] = (),
) -> str:
    """A figure of `points` (step, value); with `smooth`, its moving average on top.

    `marks` are steps that are pointed out at the foot. Returns "" for fewer than two points.
    """
    points = [point for point in points if all(map(math.isfinite, point))]
    if len(points) < 2:
        return ""
    averaged = moving_average(points) if smooth else []
    frame = _frame(points, averaged)
    lines = [
        _path(envelope(points) if smooth else thinned(points), frame, "raw" * smooth or "line")
    ]
    if averaged:
        lines.append(_path(thinned(averaged), frame, "line"))
    lines += [_mark(step, frame) for step in marks[:MAX_POINTS]]
    label = f"{title}: {spell(points[0][1])} at first, {spell((averaged or points)[-1][1])} at last"
    return _figure(title, note, label, [*_grid(frame, spell), *lines])


def overlay(
    title: str,
    runs: Sequence[Sequence[Point]],
    *,
    note: str = "",
    smooth: bool = False,
    spell: Callable[[float], str] = "{:.3g}".format,
) -> str:
    """A figure of several runs' curves over each other, with `smooth` of their moving averages.

    The n-th line has the class `run-n`. Returns "" if no run has two points.
    """
    kept = [[point for point in points if all(map(math.isfinite, point))] for points in runs]
    drawn = {
        number: moving_average(points) if smooth else points
        for number, points in enumerate(kept)
        if len(points) > 1
    }
    if not drawn:
        return ""
    every = [point for points in drawn.values() for point in points]
    frame = _frame(sorted(every), every if smooth else ())
    lines = [_path(thinned(p), frame, f"line run-{n % COLOURS}") for n, p in drawn.items()]
    ends = ", ".join(spell(points[-1][1]) for points in drawn.values())
    return _figure(title, note, f"{title} at last: {ends}", [*_grid(frame, spell), *lines])


def _figure(title: str, note: str, label: str, drawn: Sequence[str]) -> str:
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> '
        f"<span>{escape(note)}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(drawn)}</svg></figure>"
    )


def moving_average(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a thirtieth of the points, bias corrected."""
    decay = 1 - 1 / max(5.0, len(points) / 30)
    mean, weight, found = 0.0, 0.0, []
    for step, value in points:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        found.append((step, mean / weight))
    return found


def envelope(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` bins, each as its lowest and its highest value: no spike is lost."""
    if len(points) <= 2 * MAX_POINTS:
        return list(points)
    found: list[Point] = []
    for bin_ in _bins(points):
        low, high = min(bin_, key=lambda p: p[1]), max(bin_, key=lambda p: p[1])
        found += sorted({low, high})
    return found


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` of the points, the first and the last among them."""
    if len(points) <= MAX_POINTS:
        return list(points)
    return [bin_[0] for bin_ in _bins(points)] + [points[-1]]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values within [low, high], about `wanted` of them."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _bins(points: Sequence[Point]) -> list[Sequence[Point]]:
    edges = [round(i * len(points) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    return [points[a:b] for a, b in pairwise(edges) if b > a]


def _frame(points: Sequence[Point], averaged: Sequence[Point]) -> tuple[Point, Point]:
    """((first step, last step), (lowest, highest value)) of what is drawn."""
    values = sorted(value for _, value in points)
    high = values[-1 - int(len(values) * TAIL)] if averaged else values[-1]
    high = max([high, *(value for _, value in averaged)])
    low = values[0]
    if low > 0 and low < 0.6 * high:
        low = 0.0  # the zero line is near: show it
    if high - low <= abs(high) * 1e-9:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    return (points[0][0], points[-1][0]), (low, high + 0.04 * (high - low))


def _place(point: Point, frame: tuple[Point, Point]) -> Point:
    (x0, x1), (y0, y1) = frame
    x = LEFT + (point[0] - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT)
    y = HEIGHT - BOTTOM - (point[1] - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
    return x, max(TOP - 4.0, y)


def _path(points: Sequence[Point], frame: tuple[Point, Point], name: str) -> str:
    places = (_place(point, frame) for point in points)
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="{name}" points="{drawn}"/>'


def _mark(step: float, frame: tuple[Point, Point]) -> str:
    """A small triangle at the foot of a chart."""
    x, _ = _place((step, frame[1][0]), frame)
    y = HEIGHT - BOTTOM
    return f'<polygon class="mark" points="{x - 3:.1f},{y} {x + 3:.1f},{y} {x:.1f},{y - 7}"/>'


def _grid(frame: tuple[Point, Point], spell: Callable[[float], str]) -> list[str]:
    (x0, x1), (y0, y1) = frame
    found = []
    for value in ticks(y0, y1, 4):
        _, y = _place((x0, value), frame)
        found.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        found.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" class="end">{spell(value)}</text>')
    for value in ticks(x0, x1, 5):
        x, _ = _place((value, y0), frame)
        anchor = "end" if x > WIDTH - RIGHT - 16 else "mid"
        x = WIDTH - RIGHT if anchor == "end" else x
        found.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" class="{anchor}">{value:,.0f}</text>')
    return found
