"""Stateless randomness: what is drawn is a function of (seed, purpose, numbers), never of history.

Nothing is carried along and nothing has to be restored. Every draw rests on raw bits and on exactly
rounded arithmetic, so it is the same on every platform, in every version of numpy and with any
number of threads; numpy's own distributions promise none of that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import repeat
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

CELLS = 1 << 16
WORTH_A_THREAD = 1 << 16
"""Values; to draw them takes 0.2 ms, to hand work to a thread a tenth of that."""
_UNIT = 1.0000101408279616
"""Makes the variance of the quantiles one: the root of 1 / mean(q^2)."""
_SHARES = (np.float32(20 / 29), np.float32(21 / 29))  # 20^2 + 21^2 = 29^2


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A 128-bit key for `purpose` at `numbers` (for instance step and sample)."""
    return int.from_bytes(_digest(seed, purpose, *numbers), "little")


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A fresh generator for `purpose` at `numbers`.

    Philox is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
    so the key is all there is to a stream.
    """
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *numbers)))


def uniform(seed: int, purpose: str, *numbers: int) -> float:
    """One number in [0, 1) with 53 bits, straight from the key."""
    return (int.from_bytes(_digest(seed, purpose, *numbers)[:8], "little") >> 11) * 2.0**-53


def uniforms(seed: int, purpose: str, step: int, slots: Iterable[int]) -> NDArray[np.float64]:
    """`uniform` at (step, slot) for each of the slots."""
    return np.array([uniform(seed, purpose, step, slot) for slot in slots], np.float64)


def normal(shape: tuple[int, ...], seed: int, purpose: str, *numbers: int) -> torch.Tensor:
    """Standard normal noise of `shape`, float32, on the CPU (the same on every device).

    Each value is (20 q[a] + 21 q[b]) / 29, with q the normal quantiles at the middle of 65,536
    cells, scaled to unit variance, and a, b 16 random bits each. Its distribution function differs
    from the normal one by 3e-6 at most, and it reaches 6 standard deviations. It takes a third of
    the time of numpy's own normal numbers.
    """
    out = np.empty(shape, np.float32)
    _fill_normal(out.reshape(-1), key(seed, purpose, *numbers))
    return torch.from_numpy(out)


def normals(
    shape: tuple[int, ...],
    seed: int,
    purpose: str,
    step: int,
    slots: range,
    pool: ThreadPoolExecutor | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """`normal` at (step, slot) for each of the slots: (slots, *shape). The work is shared out to
    `threads` of `pool`, where there is enough of it, which changes no bit."""
    out = np.empty((len(slots), *shape), np.float32)

    def fill(first: int, every: int) -> None:
        for row, slot in zip(out[first::every], slots[first::every], strict=True):
            _fill_normal(row.reshape(-1), key(seed, purpose, step, slot))

    parts = min(threads, len(slots), out.size // WORTH_A_THREAD)
    if pool is None or parts < 2:
        fill(0, 1)
    else:
        list(pool.map(fill, range(parts), repeat(parts)))
    return torch.from_numpy(out)


def seed_torch(seed: int, purpose: str, *numbers: int) -> None:
    """Seed torch's global generators (dropout inside models) for `purpose` at `numbers`."""
    torch.manual_seed(key(seed, purpose, *numbers) % (1 << 63))


def _digest(seed: int, purpose: str, *numbers: int) -> bytes:
    text = "/".join((str(seed), purpose, *map(str, numbers)))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _fill_normal(out: NDArray[np.float32], seed: int) -> None:
    """Fill `out` (1-d, contiguous) from the stream of `seed`: 32 bits a value, the first halves of
    all values before the second ones."""
    count = len(out)
    words: NDArray[np.uint64] = np.random.SFC64(seed).random_raw(-(-count // 2))
    halves = words.astype("<u8", copy=False).view("<u2")
    second = np.empty_like(out)
    for place, start, table in zip((out, second), (0, count), _tables(), strict=True):
        cells = halves[start : start + count].astype(np.intp)
        table.take(cells, out=place, mode="clip")  # the other modes copy
    out += second


@lru_cache(maxsize=1)
def _tables() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The quantiles times 20/29 and times 21/29, float32."""
    first, second = (_quantiles() * share for share in _SHARES)
    return first, second


@lru_cache(maxsize=1)
def _quantiles() -> NDArray[np.float32]:
    """(CELLS,) float32, ascending."""
    inverse = NormalDist().inv_cdf
    lower = np.array([inverse((cell + 0.5) / CELLS) for cell in range(CELLS // 2)])
    quantiles: NDArray[np.float64] = np.concatenate([lower, -lower[::-1]]) * _UNIT
    return quantiles.astype(np.float32)
