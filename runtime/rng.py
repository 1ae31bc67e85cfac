"""Stateless randomness: a generator is a function of (seed, purpose, numbers), never of history.

Philox is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so
a key is all there is to a stream: nothing is carried along and nothing has to be restored.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A 128-bit key for `purpose` at `numbers` (for instance step and sample)."""
    text = "/".join((str(seed), purpose, *map(str, numbers)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A fresh generator for `purpose` at `numbers`."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *numbers)))


def normal(shape: tuple[int, ...], seed: int, purpose: str, *numbers: int) -> torch.Tensor:
    """Standard normal noise of `shape`, float32, on the CPU (the same on every device)."""
    values = generator(seed, purpose, *numbers).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values)


def seed_torch(seed: int, purpose: str, *numbers: int) -> None:
    """Seed torch's global generators (dropout inside models) for `purpose` at `numbers`."""
    torch.manual_seed(key(seed, purpose, *numbers) % (1 << 63))
