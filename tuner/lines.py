"""A run's progress in plain lines, and what lines and bars have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from compiler.plan import Plan
from tuner.eta import Countdown, Eta
from tuner.formats import clock, rate
from tuner.screen import style_for

Clock = Callable[[], float]
TITLES: Mapping[str, str] = {
    "text": "cache text",
    "latents": "cache latents",
    "load": "load model",
    "train": "train",
    "validate": "validate",
    "evaluate": "evaluate",
    "save": "save",
    "publish": "publish",
}
LINES = 20  # progress lines that a short run gets
MOST_STEPS = 100  # steps between two lines, at most
EVERY_SECONDS = 30.0  # between two lines of a phase that counts something else


class Lines:
    """Plain lines: each phase when it begins and now and then, a step every n-th, every message."""

    def __init__(self, plan: Plan, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._every = log_every(plan.steps.total)
        self._total = plan.steps.total
        self._clock, self._told, self._counts = clock, clock(), ("", 0, "")
        self._eta, self._left = Eta(plan, clock), Countdown(clock)

    def phase(self, name: str, total: int, unit: str) -> None:
        """See `runtime.events.Events.phase`."""
        self._eta.phase(name)
        self._left.begin(total)
        self._told, self._counts = self._clock(), (name, total, unit)
        if name not in ("train", "save"):
            counted = f": {total:,} {unit}" if total else ""
            self._print(TITLES.get(name, name) + counted)

    def advance(self, done: int, **values: Any) -> None:
        """See `runtime.events.Events.advance`."""
        name, total, unit = self._counts
        self._left.advance(done)
        left = self._left.seconds_left()
        if name == "train" or not left or self._clock() - self._told < EVERY_SECONDS:
            return
        self._told = self._clock()
        self._print(f"{TITLES.get(name, name)}: {done:,}/{total:,} {unit}  eta {clock(left)}")

    def step(self, metrics: Mapping[str, Any]) -> None:
        """See `runtime.events.Events.step`."""
        self._eta.step(metrics)
        step = int(metrics["step"])
        if step % self._every == 0 or step in (1, self._total):
            self._print(step_line(metrics, self._total, self._eta))

    def message(self, text: str, level: str = "info") -> None:
        """See `runtime.events.Events.message`."""
        self._print(text if level == "info" else f"{level}: {text}")

    def close(self) -> None:
        """Nothing is left open."""

    def _print(self, text: str) -> None:
        write(self._stream, text)


def log_every(total: int) -> int:
    """Steps between two lines: 1, 2 or 5 times a power of ten, about 20 lines in a short run."""
    wanted = total / LINES
    nice = (digit * power for power in (1, 10, 100) for digit in (1, 2, 5))
    return min(next((every for every in nice if every >= wanted), MOST_STEPS), MOST_STEPS)


def step_line(metrics: Mapping[str, Any], total: int, eta: Eta) -> str:
    """`step 100/2000  loss 0.412  grad_norm 0.83  lr 1.0e-04  3.2 s/step  eta 1:41:40`."""
    parts = [f"step {metrics['step']}/{total}", *measures(metrics), pace(eta.step_seconds)]
    left = eta.seconds_left()
    return "  ".join([*filter(None, parts), *([f"eta {clock(left)}"] if left is not None else [])])


def measures(metrics: Mapping[str, Any]) -> list[str]:
    """Loss, gradient norm and learning rate, as far as the step has them."""
    spelt: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("loss", lambda value: f"{value:.3g}"),
        ("grad_norm", lambda value: f"{value:.2g}"),
        ("lr", rate),
    )
    return [f"{key} {spell(float(metrics[key]))}" for key, spell in spelt if key in metrics]


def pace(seconds: float | None) -> str:
    """`3.2 s/step`, or `8.4 it/s` where a step takes less than a second."""
    if not seconds:
        return ""
    return f"{seconds:.1f} s/step" if seconds >= 1 else f"{1 / seconds:.1f} it/s"


def write(stream: TextIO, text: str) -> None:
    """One line, now. A reader that has gone must not end the run."""
    level = text.partition(":")[0]
    try:
        if level in ("warning", "error"):
            text = style_for(stream)(level, level) + text[len(level) :]
        stream.write(text + "\n")
        stream.flush()
    except (BrokenPipeError, ValueError):
        return
