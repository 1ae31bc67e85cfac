"""Exponential moving average of the trained weights.

At every n-th update: average <- decay * average + (1 - decay) * weights. The average starts at the
weights and is kept in float32 or wider: in bfloat16 a share of 0.001 would round away. With a
warm-up, the decay at the average's k-th update (from 1) is min((1 + k) / (10 + k), decay).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compiler import plan
from runtime.out_of_memory import updating


class Ema:
    """The average of `named_parameters`, on the host or beside them (`device` "cpu" or "same")."""

    def __init__(self, facts: plan.Ema, named_parameters: Iterable[tuple[str, nn.Parameter]]):
        self.facts = facts
        self.inside = False  # whether the parameters hold the average
        self.parameters = dict(named_parameters)
        self.average = {
            name: p.detach().to(
                p.device if facts.device == "same" else "cpu",
                torch.promote_types(p.dtype, torch.float32),
                copy=True,
            )
            for name, p in self.parameters.items()
        }

    def decay(self, done: int) -> float:
        """The share kept at the update of the average after `done` updates of the weights. A
        function of `done` alone, so that a run may go on from any step."""
        if not self.facts.warmup:
            return self.facts.decay
        count = done // self.facts.every
        return min((1 + count) / (10 + count), self.facts.decay)

    @torch.no_grad()
    def update(self, done: int, *, in_turn: bool = False) -> None:
        """Take in the weights after `done` updates, if their turn has come.

        All at once, which has copies of all of them where formats differ; with `in_turn` one after
        the other, to the same bits. What fails while it makes copies has changed nothing, unless
        it is `in_turn`.
        """
        if done % self.facts.every:
            return
        share = 1.0 - self.decay(done)
        if in_turn:
            with updating():
                for parameter, average in zip(
                    self.parameters.values(), self.average.values(), strict=True
                ):
                    average.lerp_(parameter.detach().to(average.device, average.dtype), share)
            return
        averages = list(self.average.values())
        weights = [
            p.detach().to(a.device, a.dtype)
            for p, a in zip(self.parameters.values(), averages, strict=True)
        ]
        with updating():
            torch._foreach_lerp_(averages, weights, share)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter name, copied to host memory."""
        return {name: a.to("cpu", copy=True) for name, a in self.average.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave. Raises KeyError if a parameter is missing."""
        for name, average in self.average.items():
            average.copy_(state[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the parameters hold the average; afterwards their own bits again.

        The weights wait in host memory, so that swapping needs no device memory.
        """
        with torch.no_grad():
            kept = {n: p.detach().to("cpu", copy=True) for n, p in self.parameters.items()}
        self.inside = True
        try:
            self._fill(self.average)
            yield
        finally:
            self.inside = False
            with updating():
                self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
