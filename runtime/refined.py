"""The picture that a refining family refines, as the plan's validation names it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from torch import Tensor

from compiler.data.geometry import Placement, cover
from compiler.data.headers import pillow
from compiler.plan import Plan
from runtime.data.pixels import BrokenPicture, decode, to_tensor, upright
from runtime.errors import RunFailed
from runtime.families.base import PICTURE


def picture_part(plan: Plan, width: int, height: int) -> dict[str, Any]:
    """What drawing at this size needs beside models: {} unless the plan's validation refines a
    picture. Raises RunFailed."""
    file = plan.validation.picture
    return {PICTURE: start(file, width, height)} if file else {}


def start(file: str, width: int, height: int) -> Tensor:
    """The picture in `file`, scaled so that it covers the size and cut in the middle:
    (1, 3, height, width) float32 in [-1, 1]. Raises RunFailed."""
    try:
        data = Path(file).read_bytes()
        with pillow().open(io.BytesIO(data)) as opened:
            size = upright(opened).size
        across, down = cover(*size, width, height)
        placement = Placement(
            resize_width=across,
            resize_height=down,
            crop_x=(across - width) // 2,
            crop_y=(down - height) // 2,
            width=width,
            height=height,
        )
        return to_tensor(decode(data, placement, size))[None]
    except (OSError, ValueError, SyntaxError, BrokenPicture) as error:
        raise RunFailed(
            f"the picture to refine, `{file}`, can't be read: {error}",
            help="name another one in `[validation] picture`",
        ) from error
