"""How the device's allocator rounds what it is asked for. No torch."""

from __future__ import annotations

# The CUDA caching allocator rounds each request up to this many bytes (kMinBlockSize in
# c10/core/AllocatorConfig.h). Used for every device, so that figures compare.
GRANULE = 512


def rounded(nbytes: int) -> int:
    """`nbytes` as the allocator hands it out; nothing for an empty tensor."""
    return -(-nbytes // GRANULE) * GRANULE
