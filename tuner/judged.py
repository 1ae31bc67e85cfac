"""What is measured now and then besides the steps' own metrics, and what people call it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from compiler.keeping import CLIP_SCORE, LOSS
from compiler.plan import EVALUATION


def judged_by(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of these metrics, the loss first, then that of each source, then others."""
    found = {key for row in metrics for key in row if key.startswith(EVALUATION)}
    return sorted(found, key=lambda key: (not key.startswith(LOSS), key))


def judged_title(key: str) -> str:
    """What a metric is called."""
    if key == CLIP_SCORE:
        return "CLIP score"
    source = key.removeprefix(LOSS).lstrip("/")
    return f"Evaluation loss: {source}" if source else "Evaluation loss"


def judged_note(key: str) -> str:
    """What a metric is of."""
    return "of the validation pictures" if key == CLIP_SCORE else "of held-out images"
