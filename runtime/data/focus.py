"""Where the cut of a picture lies that is made around a face or around what strikes the eye.

Faces: OpenCV's cascade of Haar features for frontal faces (Viola and Jones, CVPR 2001), which its
package carries, on the picture in grey with the longer edge brought down to `LOOKED_AT`. The
largest face counts, of equally large ones the upper left; the cut's middle is that of the face.
Saliency: OpenCV's spectral residual (Hou and Zhang, CVPR 2007); the cut's middle is the centre of
mass of the map above its mean. Where nothing is found the cut stays where the placement has it.

All of it depends on the pixels alone: the same picture is cut alike in every run.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
from attrs import evolve
from numpy.typing import NDArray
from PIL import Image

from compiler.data.geometry import Focus, Placement
from runtime.errors import MachineUnfit

LOOKED_AT = 512  # pixels; faces smaller than a twentieth of that are not looked for
CONTRAST = 8  # levels of 256; in a picture with less, the map shows rounding and nothing else
SMALLEST = 24  # pixels; what the cascade was trained on

Middle = tuple[float, float]
"""A place in the picture, as shares of its width and height."""


def require_opencv() -> None:
    """Raises MachineUnfit where faces and saliency can't be looked for."""
    if importlib.util.find_spec("cv2") is None:
        raise MachineUnfit(
            "cuts around faces and salient parts need OpenCV, which is not installed",
            help='pip install "tuner[crop]", or say crop = { style = "center" }',
        )
    cv2 = _opencv()
    if not hasattr(cv2, "CascadeClassifier") or not hasattr(cv2, "saliency"):
        raise MachineUnfit(
            f"this build of OpenCV {cv2.__version__} has no detectors of faces and saliency",
            help='pip install "opencv-contrib-python-headless>=4.10,<5"',
        )


def focused(image: Image.Image, placement: Placement) -> Placement:
    """`placement` with its cut moved to where its focus is found in `image`, which is upright and
    not yet scaled."""
    if not placement.focus:
        return placement
    middle = find(image, placement.focus)
    if middle is None:
        return placement
    return evolve(
        placement,
        crop_x=_start(middle[0], placement.resize_width, placement.width),
        crop_y=_start(middle[1], placement.resize_height, placement.height),
    )


def find(image: Image.Image, focus: Focus) -> Middle | None:
    """The middle of what `focus` names; None if there is none."""
    grey = _grey(image)
    return _face(grey) if focus == "face" else _salient(grey)


def _start(middle: float, edge: int, cut: int) -> int:
    """Where a cut begins that has `middle` in its middle, as far as the picture reaches."""
    return min(max(0, round(middle * edge - cut / 2)), edge - cut)


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    scale = min(1.0, LOOKED_AT / max(image.size))
    size = tuple(max(1, round(edge * scale)) for edge in image.size)
    small = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BOX)
    return np.asarray(small.convert("L"))


def _face(grey: NDArray[np.uint8]) -> Middle | None:
    if min(grey.shape) < SMALLEST:
        return None
    found = _cascade().detectMultiScale(
        grey, scaleFactor=1.1, minNeighbors=5, minSize=(SMALLEST, SMALLEST)
    )
    if len(found) == 0:
        return None
    x, y, width, height = min(
        (tuple(map(int, box)) for box in found), key=lambda box: (-box[2] * box[3], box[1], box[0])
    )
    return (x + width / 2) / grey.shape[1], (y + height / 2) / grey.shape[0]


def _salient(grey: NDArray[np.uint8]) -> Middle | None:
    if int(grey.max()) - int(grey.min()) < CONTRAST:
        return None
    done, found = _opencv().saliency.StaticSaliencySpectralResidual_create().computeSaliency(grey)
    if not done:
        return None
    salient = np.asarray(found, np.float64)
    weights = np.clip(salient - salient.mean(), 0, None)
    total = weights.sum()
    if not np.isfinite(total) or total <= 0:
        return None
    y, x = np.indices(weights.shape)
    across = ((x + 0.5) * weights).sum() / total / grey.shape[1]
    down = ((y + 0.5) * weights).sum() / total / grey.shape[0]
    return float(across), float(down)


def _cascade() -> Any:
    """A detector of its own for each call: one must not be shared by threads."""
    cv2 = _opencv()
    return cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_frontalface_default.xml")


def _opencv() -> Any:
    return importlib.import_module("cv2")
