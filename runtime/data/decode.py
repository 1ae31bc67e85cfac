"""Decodes pictures and their masks in threads, ahead of the encoder."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from attrs import frozen
from torch import Tensor

from compiler.data.geometry import Placement
from compiler.data.manifest import Item, Manifest
from compiler.data.scan import shown
from compiler.plan import Plan
from runtime.data import masks
from runtime.data.items import read
from runtime.data.keys import LatentKeys, mask_kind, mask_path
from runtime.data.pixels import BrokenPicture, decode_placed, to_tensor
from runtime.errors import RunFailed

_AHEAD = 3  # decoded pictures held per thread, beside those of a batch


@frozen(kw_only=True)
class Ready:
    """A decoded picture."""

    pixels: Tensor  # (1, 3, H, W) float32 in [-1, 1]
    placement: Placement  # with the cut where its focus was found
    mask: masks.Mask | None  # (H, W) in [0, 1]


Decoded = tuple[int, Ready | BrokenPicture]


def decoded(
    rows: Iterable[int],
    plan: Plan,
    manifest: Manifest,
    keys: Sequence[bytes],
    latents: LatentKeys,
) -> Iterator[Decoded]:
    """Rows with their pixels, in order, a few more than the next batch ahead of who asks."""
    ahead = plan.workers * _AHEAD + plan.vae_batch - 1

    def decode_row(row: int) -> Decoded:
        return row, _ready(plan, manifest, row, keys[row], latents)

    waiting: deque[Future[Decoded]] = deque()
    with ThreadPoolExecutor(plan.workers) as pool:
        try:
            for row in rows:
                waiting.append(pool.submit(decode_row, row))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _ready(
    plan: Plan, manifest: Manifest, row: int, key: bytes, latents: LatentKeys
) -> Ready | BrokenPicture:
    """The pixels of what was hashed; a file that has changed since then is an error."""
    item, sample = manifest.item(row), manifest[row]
    size = (sample.width, sample.height)
    try:
        data, drawn = read(item), b""
        kind = mask_kind(plan, sample.source)
        if path := mask_path(plan, manifest, row):
            drawn = read(Item(file=path))
            kind = hashlib.sha256(drawn).hexdigest()
        if latents.key(hashlib.sha256(data).digest(), sample.placement, kind) != key:
            raise RunFailed(
                f"{shown(item.file)} was changed while the run began", help="run the recipe again"
            )
        pixels, placement = decode_placed(data, sample.placement, size)
        return Ready(
            pixels=to_tensor(pixels)[None],
            placement=placement,
            mask=masks.mask_of(kind, data, drawn, placement, size) if kind else None,
        )
    except OSError as error:
        return BrokenPicture(f"can't be read: {error.strerror or error}")
    except BrokenPicture as broken:
        return broken
