"""How a run tells the outside what happens; only `tuner` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Events(Protocol):
    """What a run reports. Implementations must not raise and must return quickly."""

    def phase(self, name: str, total: int, unit: str) -> None:
        """A phase begins: "text", "latents", "load", "train", "validate", "evaluate",
        "save", or "publish" once the run is finished; `total` 0: unknown."""
        ...

    def advance(self, done: int, **values: Any) -> None:
        """`done` units of the current phase are complete (absolute, not a difference)."""
        ...

    def step(self, metrics: Mapping[str, Any]) -> None:
        """One optimizer step: the same mapping as a line of metrics.jsonl."""
        ...

    def message(self, text: str, level: str = "info") -> None:
        """A sentence for the person: "info", "warning" or "error"."""
        ...


class Silent:
    """Reports nothing."""

    def phase(self, name: str, total: int, unit: str) -> None:
        """See `Events.phase`."""

    def advance(self, done: int, **values: Any) -> None:
        """See `Events.advance`."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """See `Events.step`."""

    def message(self, text: str, level: str = "info") -> None:
        """See `Events.message`."""
