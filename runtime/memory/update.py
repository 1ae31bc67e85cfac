"""The update of trained parameters alone, on meta tensors: what it takes is told by their forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from compiler.memory import Candidate
from compiler.plan import Layout
from runtime.collector import collector_off
from runtime.fused_backward import total_norm
from runtime.memory.curve import Curve
from runtime.memory.primed import average, give_gradients, prime
from runtime.memory.shares import Form, kind_of
from runtime.memory.step import META, complete
from runtime.memory.tracker import Tracker
from runtime.offload.host import counted


@frozen(kw_only=True, eq=False)
class Update:
    """Bytes by category, or their course in time."""

    primed: Mapping[str, int]  # once the optimizer has its state
    before: Mapping[str, int]  # when the gradients are complete
    curves: Sequence[Curve]

    def within(self, after: Mapping[str, int]) -> Sequence[Curve]:
        """Its course in a step in which `after` is live when the gradients are complete."""
        names = sorted(
            {*self.before, *after, *(n for each in self.curves for n in each.categories)}
        )
        more = [after.get(name, 0) - self.before.get(name, 0) for name in names]
        found = []
        for curve in self.curves:
            live = np.zeros((len(curve.sizes), len(names)), np.int64) + np.array(more, np.int64)
            live[:, [names.index(name) for name in curve.categories]] += curve.live
            found.append(evolve(curve, categories=tuple(names), live=live))
        return found


def depends_on(candidate: Candidate, forms: Sequence[Form], idle: Sequence[Form]) -> Hashable:
    """All that `run_update` asks for."""
    layout = Layout(fused_backward=candidate.layout.fused_backward)
    kinds = Counter(map(kind_of, forms)), Counter(map(kind_of, idle))
    rest = evolve(
        candidate,
        model=evolve(candidate.model, components=(), configs={}),
        layout=layout,
        micro_batch=0,
        accumulate=1,
    )
    return repr((rest, [sorted(each.items(), key=repr) for each in kinds]))


def run_update(
    candidate: Candidate, forms: Sequence[Form], idle: Sequence[Form], tracker: Tracker
) -> Update:
    """The update of parameters of `forms`, of which `idle` get no gradient."""
    with tracker, collector_off(), counted(tracker.elsewhere):
        tracker.category = "weights" if candidate.adapter is None else "adapter"
        made = tracker.made((shape, dtype) for _, shape, dtype in forms)
        trainable = {
            name: nn.Parameter(tensor) for (name, *_), tensor in zip(forms, made, strict=True)
        }
        optimizer = prime(candidate, trainable, tracker)
        ema = average(candidate, trainable, tracker)
        primed = tracker.categories()
        finish = None
        if candidate.layout.fused_backward:  # no gradient is left, but the norm of each
            for parameter in trainable.values():
                parameter.grad = None
            finish = partial(_last_norm, _norms(len(trainable) - len(idle), tracker))
        else:
            tracker.category = "gradients"
            for parameter in trainable.values():
                parameter.grad = None
            without = {name for name, *_ in idle}
            reached = [p for name, p in trainable.items() if name not in without]
            give_gradients(reached, tracker)
        before = tracker.categories()
        complete(candidate, trainable, optimizer, ema, finish, tracker)
    return Update(primed=primed, before=before, curves=tracker.curves())


def _norms(count: int, tracker: Tracker) -> list[Tensor]:
    tracker.category = "activations"
    return [torch.zeros((), device=META) for _ in range(count)]


def _last_norm(norms: list[Tensor]) -> Tensor:
    """As `FusedBackward.finish`, which lets go of each gradient's norm."""
    kept = list(norms)
    norms.clear()
    return total_norm(kept)
