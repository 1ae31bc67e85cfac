"""Manifests for tests."""

from __future__ import annotations

from collections.abc import Sequence

from compiler.data.geometry import Placement
from compiler.data.manifest import Folder, Manifest, Sample


def whole(width: int, height: int) -> Placement:
    """The placement that neither scales nor cuts."""
    return Placement(
        resize_width=width, resize_height=height, crop_x=0, crop_y=0, width=width, height=height
    )


def sample(source: int, key: str, width: int = 64, height: int = 64, caption: str = "") -> Sample:
    """A picture that is its own bucket."""
    return Sample(
        source=source,
        key=key,
        bytes=1000 + len(key),
        width=width,
        height=height,
        placement=whole(width, height),
        captions=(caption,),
    )


def manifest_of(counts: Sequence[Sequence[int]]) -> Manifest:
    """`counts[source][bucket]` pictures; bucket b is 64 x (64 + 64 b) pixels."""
    folders = [Folder(id=f"s{i}", path=f"/data/s{i}") for i in range(len(counts))]
    samples = [
        sample(source, f"{bucket}-{i:04}.png", 64, 64 + 64 * bucket, f"caption {i % 3}")
        for source, buckets in enumerate(counts)
        for bucket, images in enumerate(buckets)
        for i in range(images)
    ]
    return Manifest(folders, samples)
