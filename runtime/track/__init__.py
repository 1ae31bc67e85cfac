"""Where metrics go: `metrics.jsonl` always, trackers where the plan asks for them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from runtime import files
from runtime.errors import MachineUnfit

METRICS = "metrics.jsonl"
NOT_PLOTTED = frozenset({"step", "names", "spike"})


class Tracker(Protocol):
    """One destination. `step` is the number of updates done."""

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One optimizer step's metrics."""
        ...

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """One validation picture."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class JsonLines:
    """`metrics.jsonl`: one object a line, one line a step, on disk when `metrics` returns."""

    def __init__(self, path: Path, done: int) -> None:
        """Open for appending after `done` steps; lines of later steps are dropped first."""
        truncate(path, done)
        self._file = path.open("a", encoding="utf-8")

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Pictures are files already."""

    def close(self) -> None:
        """Close the file, once all of it has reached the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of `path` that are whole, in order; none if it is not there."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def truncate(path: Path, done: int) -> None:
    """Keep the lines of steps up to `done`, so that going on from there repeats none.

    A last line that was cut by a kill is dropped too.
    """
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _keeps(line, done)]
    files.write_whole(path, "".join(line + "\n" for line in kept))


def _keeps(line: str, done: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= done
    except (ValueError, KeyError, TypeError):
        return False


class TensorBoard:
    """Event files below `tensorboard/`; a resumed run goes on in a new file from its step."""

    def __init__(self, folder: Path, done: int) -> None:
        """Raises MachineUnfit if TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MachineUnfit(
                "tracker `tensorboard` needs the package `tensorboard`",
                help="pip install 'tuner[tensorboard]'",
            ) from error
        # purge_step: TensorBoard hides what an interrupted run wrote from this step on.
        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One scalar for each number."""
        for name, value in values.items():
            if name not in NOT_PLOTTED and isinstance(value, int | float):
                self._writer.add_scalar(f"train/{name}", value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """The picture as PNG."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        buffer = io.BytesIO()
        image.save(buffer, "png")
        value = Summary.Value(
            tag=f"samples/{name}",
            image=Summary.Image(
                height=image.height,
                width=image.width,
                colorspace=3,
                encoded_image_string=buffer.getvalue(),
            ),
        )
        writer: Any = self._writer
        writer._get_file_writer().add_summary(Summary(value=[value]), step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


TRACKERS: Mapping[str, Callable[[Path, int], Tracker]] = {
    "tensorboard": lambda run_folder, done: TensorBoard(run_folder / "tensorboard", done),
}


def open_trackers(run_folder: Path, names: tuple[str, ...], done: int) -> list[Tracker]:
    """`metrics.jsonl` and the plan's trackers, for a run that has done `done` steps."""
    lines: list[Tracker] = [JsonLines(run_folder / METRICS, done)]
    return lines + [TRACKERS[name](run_folder, done) for name in names]
