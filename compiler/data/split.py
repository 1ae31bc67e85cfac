"""The one split into what is trained and what is held out.

Pictures are ranked by a hash of (seed, key), and the first of them are held out: `holdout` below 1
is a share, of which `share * images` rounded half up, but at least one, is taken; a whole number is
a count. The images are those that a source could train; one that several rows of a table name is
one picture, called by the first of its keys, so that all its rows go where it goes. The split
depends on nothing else: not on resolutions, mirror images or other sources, so that all samples of
a picture lie on one side of it. A larger `holdout` holds out what a smaller one does, and more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction


def count_held_out(images: int, holdout: Fraction) -> int:
    """How many of `images` are held out; it may be all of them or more than there are."""
    if holdout == 0:
        return 0
    if holdout >= 1:
        return int(holdout)
    return max(1, int(images * holdout + Fraction(1, 2)))


def held_out(keys: Sequence[str], holdout: Fraction, seed: int) -> frozenset[str]:
    """Those of `keys` that are not trained on."""
    count = count_held_out(len(keys), holdout)
    return frozenset(sorted(keys, key=lambda key: _rank(key, seed))[:count])


def _rank(key: str, seed: int) -> bytes:
    name = f"{seed}/holdout/{key}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(name, digest_size=16).digest()
