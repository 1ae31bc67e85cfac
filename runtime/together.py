"""What ranks that hold parts of one model do together, however it is dealt out.

All ranks have to call the model equally often, since each call gathers its weights from all. A rank
with fewer batches makes up for it with passes over an example batch that weigh nothing; and where
rank 0 alone has something to draw or to measure, the others call the model as often as it does.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compiler.plan import Plan
from runtime.batch import Batch
from runtime.ema import Ema
from runtime.families.base import Family
from runtime.families.common import inference
from runtime.ranks import Ranks, connected
from runtime.step import forward_losses, micro_step

OVER, AS_TRAINED, AS_AVERAGE = 0, 1, 2  # what rank 0 says of the call that comes


class Together(ABC):
    """This rank's part of a model, and what all ranks do together with it.

    Any method raises RanksLost where another rank is no more.
    """

    updates = False  # whether `norm` makes the update, too, unless the norm is not finite
    backward: Callable[[Tensor], None] | None = None  # of a pass of training; None: autograd's

    def __init__(
        self, plan: Plan, family: Family, model: nn.Module, device: torch.device, ranks: Ranks
    ) -> None:
        self.called: Any = model  # in a pass of training
        self._plan, self._family, self._model, self._ranks = plan, family, model, ranks
        self._device = device

    @property
    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer updates, by the weights' names."""

    @abstractmethod
    def collect(self) -> None:
        """Hand the sums of gradients that the backward passes left to the optimizer."""

    @abstractmethod
    def norm(self) -> Tensor:
        """L2 norm over all gradients of all ranks together, float32: the same in every rank."""

    @abstractmethod
    def gathered(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, in host memory, of which `values` are this rank's part; {} in all
        ranks but the first."""

    def behind(self, passes: int) -> int:
        """How many passes fewer than some other rank this one makes if it makes `passes`."""
        return self._ranks.most(passes) - passes

    def make_up(self, passes: int) -> None:
        """So many forward and backward passes for the other ranks' sake: they add zero to sums."""
        plan = self._plan
        for _ in range(passes):
            given = (self._family, self.called, self._example(), plan.objective, plan.precision)
            micro_step(*given, math.inf, backward=self.backward)

    def led(
        self, task: Callable[[], None], ema: Ema | None, following: AbstractContextManager[None]
    ) -> None:
        """Rank 0 does `task`, which may call the model, with `ema` swapped in or not; the others
        call it as often, inside `following`."""
        with connected():
            if self._ranks.leads:
                with self._announcing(ema):
                    task()
            else:
                with following:
                    self._follow(ema)
        self._ranks.told("")

    @contextmanager
    def _announcing(self, ema: Ema | None) -> Iterator[None]:
        """Inside, every call of the model is told to the other ranks before it gathers weights.

        Nothing is told after a failure: the others end when this process does.
        """

        def announce(*_: Any) -> None:
            self._let_go()
            self._say(AS_AVERAGE if ema is not None and ema.inside else AS_TRAINED)

        handle = self._model.register_forward_pre_hook(announce, prepend=True)
        try:
            yield
        finally:
            handle.remove()
        self._let_go()
        self._say(OVER)

    def _follow(self, ema: Ema | None) -> None:
        said = AS_TRAINED
        with ExitStack() as averaged, inference(self._model):
            while (word := self._say()) != OVER:
                if word != said:
                    averaged.close()
                    averaged.enter_context(_averaged(ema if word == AS_AVERAGE else None))
                    said = word
                plan = self._plan
                given = (self._family, self._model, self._example())
                forward_losses(*given, plan.objective, plan.precision)
                self._let_go()

    def _say(self, word: int = OVER) -> int:
        """Rank 0's `word`, in every rank. Through host memory."""
        told = torch.tensor(word)
        dist.broadcast(told, 0)
        return int(told.item())

    def _let_go(self) -> None:
        """Drop what is gathered: weights may be others when the model is called again."""
        return None  # nothing is, where every rank has the whole model

    def _example(self) -> Batch:
        """One sample of the smallest size."""
        smallest = min(self._plan.buckets, key=lambda bucket: bucket.width * bucket.height)
        plan = self._plan
        size = (smallest.width, smallest.height)
        return self._family.example_batch(plan.model, *size, 1, plan.text, self._device)


def _averaged(ema: Ema | None) -> AbstractContextManager[None]:
    return nullcontext() if ema is None else ema.swapped()
