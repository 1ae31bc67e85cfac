"""TensorBoard: event files below `tensorboard/` in the run folder."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from runtime.track.base import Opening, numbers


class Board:
    """A resumed run goes on in a new file from its step."""

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: TensorBoard hides what an interrupted run wrote from this step on.
        folder = opening.run_folder / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=opening.done + 1)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One scalar for each number."""
        for name, value in numbers(values).items():
            self._writer.add_scalar(name, value, step)

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
