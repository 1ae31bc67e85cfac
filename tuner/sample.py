"""`tuner sample`: pictures by a run's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuner.exits import DONE
from tuner.export import failed, log_of, refused
from tuner.screen import out


def sample_run(
    folder: Path,
    prompts: Sequence[str],
    *,
    negative: str | None,
    size: str,
    guidance: float | None,
    steps: int | None,
    seed: int | None,
    count: int,
    step: int | None,
    ema: bool | None,
    device: str,
    place: Path | None,
) -> int:
    """Draw, and name each picture's file on stdout as it is there; returns the exit code."""
    from runtime.errors import RunFailed
    from runtime.export.pictures import pictures
    from runtime.export.request import Refused, chosen

    try:
        weights = chosen(folder, step=step, ema=ema)
        wanted = pictures(
            weights,
            prompts,
            negative=negative,
            size=size,
            guidance=guidance,
            steps=steps,
            seed=seed,
            count=count,
            device=device,
            out=place,
        )
    except Refused as error:
        return refused(error)
    from runtime.quiet import quiet

    try:
        with quiet(log_of(folder)):
            from runtime.export.draw import draw

            draw(weights, wanted, lambda path: out(str(path)))
    except RunFailed as error:
        return failed(error)
    return DONE
