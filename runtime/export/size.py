"""How large an exported LoRA is to be: a rank, or a share of what it holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

LARGEST = 16_384  # as `adapter.rank`


@frozen(kw_only=True)
class Size:
    """`rank` at most; or, where `energy` is not 0, the smallest rank that keeps so much of the sum
    of the squares of singular values, layer by layer."""

    rank: int = LARGEST
    energy: float = 0.0

    def of(self, values: Sequence[float]) -> int:
        """The rank for singular values, largest first: at least 1."""
        found = min(self.rank, len(values))
        if self.energy:
            total, kept = sum(v * v for v in values), 0.0
            for number, value in enumerate(values, 1):
                kept += value * value
                if kept >= self.energy * total:
                    return max(1, min(found, number))
        return max(1, found)


def parsed(text: str) -> Size | None:
    """The size that "32", "95%" or "0.95" stands for; None if it stands for none."""
    try:
        if text.endswith("%"):
            energy = float(text.removesuffix("%")) / 100
        elif "." in text:
            energy = float(text)
        else:
            rank = int(text)
            return Size(rank=rank) if 1 <= rank <= LARGEST else None
    except ValueError:
        return None
    return Size(energy=energy) if 0 < energy <= 1 else None
