"""Training samples as small pictures: cut as the model sees them, what a mask hides in grey."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from attrs import frozen
from PIL import Image

from compiler.data.manifest import Item, Manifest
from compiler.plan import Plan
from runtime.data import masks
from runtime.data.items import read
from runtime.data.keys import mask_kind, mask_path
from runtime.data.pixels import BrokenPicture, decode_placed
from runtime.data.ranged import Unreachable

EDGE = 256  # pixels of an embedded picture, at most
DIMMED = 0.8  # of what a mask leaves out


@frozen(kw_only=True)
class Shown:
    """One sample as it is shown."""

    row: int
    address: str  # "data:..."; "" where the picture is broken
    why: str  # it is broken
    share: float | None  # of the cut that its mask shows; None without one


def shown(plan: Plan, manifest: Manifest, rows: Sequence[int]) -> Iterator[Shown]:
    """The samples `rows` in order, decoded by the plan's workers."""
    with ThreadPoolExecutor(plan.workers) as pool:
        yield from pool.map(lambda row: _shown(plan, manifest, row), rows)


def _shown(plan: Plan, manifest: Manifest, row: int) -> Shown:
    sample = manifest[row]
    size, path = (sample.width, sample.height), mask_path(plan, manifest, row)
    kind = mask_kind(plan, sample.source)
    share = None
    try:
        data, drawn = read(manifest.item(row)), read(Item(file=path)) if path else b""
        pixels, placement = decode_placed(data, sample.placement, size)
        if kind:
            mask = masks.mask_of(kind, data, drawn, placement, size)
            share = float(mask.mean())
            hidden = DIMMED * (1 - mask[..., None])
            pixels = (pixels * (1 - hidden) + 128 * hidden).astype(np.uint8)
    except (BrokenPicture, OSError, Unreachable) as error:
        return Shown(row=row, address="", why=str(error), share=None)
    return Shown(row=row, address=_address(pixels), why="", share=share)


def _address(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> str:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((EDGE, EDGE))
    written = io.BytesIO()
    image.save(written, "jpeg", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"


def some_of(rows: Sequence[int], count: int, seed: int) -> list[int]:
    """At most `count` of the rows, in order, chosen by the seed."""

    def rank(row: int) -> bytes:
        return hashlib.blake2b(f"{seed}/sheet/{row}".encode(), digest_size=8).digest()

    return sorted(rows) if len(rows) <= count else sorted(sorted(rows, key=rank)[:count])
