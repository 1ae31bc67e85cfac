"""Loss scaling: what lets gradients be computed in float16.

Small gradients are zero in float16, so the loss is multiplied by a scale before the backward pass
and the gradients are divided by it in float32 afterwards. Where one of them overflowed, the update
is left out and the scale halved; after many updates without that it is doubled. (Micikevicius et
al., "Mixed precision training", arXiv 1710.03740, section 3.2; the constants are those of
`torch.amp.GradScaler`.) All scales are powers of two, so scaling itself rounds nothing.

Everything stays on the device: nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compiler.plan import Precision

START = 65536.0
GROWTH = 2.0
BACKOFF = 0.5
INTERVAL = 2000  # updates without an overflow after which the scale grows
FLOOR = 1.0  # what overflows at this scale does so without any


class Scaler:
    """The scale of the loss. For each update: `unscale`, then `update`."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), START, device=device)  # float32
        self._good = torch.zeros((), dtype=torch.int64, device=device)  # since it last changed

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients, which are float32, by the scale, in place."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self.scale.reciprocal())

    def update(self, overflowed: Tensor) -> None:
        """Follow an update; `overflowed` (a truth value) says that a gradient was not finite."""
        grows = ~overflowed & (self._good + 1 >= INTERVAL)
        fallen = (self.scale * BACKOFF).clamp(min=FLOOR)
        kept = torch.where(grows, self.scale * GROWTH, self.scale)
        self.scale = torch.where(overflowed, fallen, kept)
        self._good = torch.where(overflowed | grows, 0, self._good + 1)

    def state(self) -> dict[str, Any]:
        """What `load_state` takes, as plain numbers."""
        return {"scale": self.scale.item(), "good": int(self._good.item())}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.scale = torch.full_like(self.scale, float(state["scale"]))
        self._good = torch.full_like(self._good, int(state["good"]))


def scaler_for(precision: Precision, device: torch.device) -> Scaler | None:
    """A new one where gradients are computed in float16; None: nothing is to be scaled."""
    return Scaler(device) if precision.compute == "float16" else None
