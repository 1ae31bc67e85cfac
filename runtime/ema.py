"""Exponential moving average of the trained weights.

At every n-th update: average <- decay * average + (1 - decay) * weights. The average starts at the
weights and is kept in float32 or wider: in bfloat16 a share of 0.001 would round away. With a
warm-up, the decay at the average's k-th update (from 1) is min((1 + k) / (10 + k), decay).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from compiler import plan
from runtime.out_of_memory import updating

PIECE = 64 * 2**20
"""Bytes of weights that are copied together to an average on another device; a larger tensor is
copied alone. Copies of all of them would take as much of the host as the average itself."""
Pair = tuple[Tensor, nn.Parameter]  # of an average and what it follows


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

        Beside them all at once, which has copies of all of them where formats differ; on another
        device in pieces of `PIECE` bytes; with `in_turn` one after the other: to the same bits.
        What fails while the first copies are made has changed nothing.
        """
        if done % self.facts.every:
            return
        share = 1.0 - self.decay(done)
        with ExitStack() as changing:
            for number, piece in enumerate(self._pieces(in_turn=in_turn)):
                weights = [_copied(*pair) for pair in piece]
                if not number:
                    changing.enter_context(updating())
                torch._foreach_lerp_([average for average, _ in piece], weights, share)
                del weights  # or they would be there beside the next ones

    def _pieces(self, *, in_turn: bool) -> Iterator[Sequence[Pair]]:
        """The averages with their parameters, in parts that are copied together."""
        most = 0 if in_turn else PIECE
        piece: list[Pair] = []
        held = 0
        for average, parameter in zip(self.average.values(), self.parameters.values(), strict=True):
            size = average.nbytes if in_turn or _is_elsewhere(average, parameter) else 0
            if piece and held + size > most:
                yield piece
                piece, held = [], 0
            piece.append((average, parameter))
            held += size
        if piece:
            yield piece

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


def _copied(average: Tensor, parameter: nn.Parameter) -> Tensor:
    """A parameter as its average's device and format are. It is widened there, not before it is
    moved, which would take more of the device that it leaves."""
    weight = parameter.detach()
    if _is_elsewhere(average, parameter):
        weight = weight.to(average.device)
    return weight.to(average.dtype)


def _is_elsewhere(average: Tensor, parameter: nn.Parameter) -> bool:
    return average.device != parameter.device
