"""The picture that a validation refines, for families that refine one."""

from __future__ import annotations

import math

from compiler.data.headers import read_header
from compiler.data.quick_headers import Broken, Size
from compiler.draft import Draft
from compiler.passes.model import folder_of
from compiler.spans import KeyPath

WHERE: KeyPath = ("validation", "picture")


def refined_picture(draft: Draft, steps: int) -> str | None:
    """Its absolute path; None where nothing is refined. There are prompts, and so many sampling
    steps."""
    assert draft.model is not None
    family, asked = draft.model.family, draft.recipe.validation.picture
    if not family.refines:
        if asked:
            draft.error(
                "not-in-family",
                WHERE,
                f"{family.title} draws from noise: it refines no picture",
                help="leave `picture` out",
                of="key",
            )
        return None
    if int(steps * family.refines) < 1:
        draft.error(
            "out-of-range",
            ("validation", "steps"),
            f"of {steps} steps the last {family.refines:.0%} refine the picture: that is none",
            help=f"steps = {math.ceil(1 / family.refines)}, or more",
        )
    if not asked:
        draft.error(
            "missing-key",
            ("validation", "prompts"),
            f"{family.title} draws nothing by itself: it refines a picture, and none is named",
            help='picture = "photo.png"',
            of="key",
        )
        return None
    file = folder_of(draft.folder, asked)
    if file is None or not file.is_file():
        draft.error(
            "missing-path",
            WHERE,
            f"there is no picture `{asked}`",
            help="the path of a picture file, relative to the recipe",
        )
        return None
    why = _unreadable(str(file))
    if why:
        draft.error(
            "broken-images",
            WHERE,
            f"`{asked}` is no picture: {why}",
            help="the path of a file such as .png or .jpg",
        )
        return None
    return str(file)


def _unreadable(path: str) -> str:
    """Why the file is no picture; "" if it is one."""
    try:
        match read_header(path):
            case Size():
                return ""
            case Broken(why):
                return why
            case _:
                return "it is of no format that is read"
    except OSError as error:
        return f"it can't be read: {error.strerror or error}"
