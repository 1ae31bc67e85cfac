"""`tuner export`: a run's weights for other programs."""

from __future__ import annotations

import os
from pathlib import Path

from tuner.exits import DONE, FAILED, REFUSED, UNFIT
from tuner.screen import err, out


def export_run(
    folder: Path,
    *,
    format: str,
    step: int | None,
    merge: bool,
    single_file: bool,
    everything: bool,
    bundle: bool,
    precision: str,
    resize: str,
    ema: bool | None,
    place: Path | None,
) -> int:
    """Write what is asked for and say where it is; returns the exit code."""
    from runtime.errors import RunFailed
    from runtime.export.request import Refused, chosen, requested

    try:
        request = requested(
            chosen(folder, step=step, ema=ema),
            format=format,
            merge=merge,
            single_file=single_file,
            everything=everything,
            bundle=bundle,
            precision=precision,
            resize=resize,
            out=place,
        )
    except Refused as error:
        return refused(error)
    from runtime.quiet import quiet

    try:
        with quiet(log_of(folder)):
            from runtime.export.export import export

            written = export(request)
    except RunFailed as error:
        return failed(error)
    out(str(written))
    return DONE


def extract_lora(
    base: Path,
    tuned: Path,
    *,
    format: str,
    precision: str,
    resize: str,
    of_a_run: bool,
    place: Path | None,
) -> int:
    """Write the LoRA of the difference of two models; returns the exit code."""
    from runtime.errors import RunFailed
    from runtime.export.request import Refused, extraction

    try:
        if of_a_run:
            raise Refused("`--extract` takes two models, no run", help="see `tuner export --help`")
        format_, size, out_ = extraction(tuned, format, precision, resize, place)
    except Refused as error:
        return refused(error)
    from runtime.quiet import quiet

    try:
        with quiet(Path(os.devnull)):
            from runtime.export.extract import extract

            found = extract(base, tuned, size, format=format_, precision=precision, out=out_)
    except Refused as error:
        return refused(error)
    except RunFailed as error:
        return failed(error)
    if found.left:
        first = ", ".join(found.left[:3])
        err(f"note: a LoRA can't hold all that differs, such as {first}")
    out(str(found.out))
    return DONE


def log_of(folder: Path) -> Path:
    """Where the libraries' chatter goes: the run's log, if it can be written."""
    return folder / "run.log" if os.access(folder, os.W_OK) else Path(os.devnull)


def refused(error: Exception) -> int:
    """Say that nothing was begun, and why."""
    _say(error)
    return REFUSED


def failed(error: Exception) -> int:
    """Say what went wrong; the exit code tells a machine that can't from other failures."""
    from runtime.errors import MachineUnfit

    _say(error)
    return UNFIT if isinstance(error, MachineUnfit) else FAILED


def _say(error: Exception) -> None:
    err(f"error: {error}")
    if help := getattr(error, "help", ""):
        err(f"help: {help}")
