"""What of a run lies on the device between two pieces of work, as the plan's memory names it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from compiler.plan import Plan
from runtime.build import Built
from runtime.loop import Trained
from runtime.memory.gauge import lying
from runtime.methods.sprint import Distillation
from runtime.optimizers import state_tensors


def loaded(plan: Plan, built: Built | Trained) -> dict[str, Sequence[Tensor]]:
    """The model's tensors by category; where one stands in two, the later one holds."""
    trainable = built.trainable if isinstance(built, Built) else built.parameters
    others = built.method.others if isinstance(built.method, Distillation) else []
    encoders = built.text.encoders.values() if built.text else ()
    there = lying(built.model, *others, *encoders)
    trained = [*trainable.values(), *_trained(built.model, *encoders)]
    if plan.adapter is None:
        return {**there, "weights": [*there["weights"], *trained]}
    return {**there, "adapter": trained}


def resident(plan: Plan, trained: Trained) -> dict[str, Sequence[Tensor]]:
    """All of it, with the optimizer's state, the average and what is left of gradients."""
    rival, ema = trained.rival, trained.ema
    kept = loaded(plan, trained) | {
        "optimizer": [
            *state_tensors(trained.optimizer),
            *(state_tensors(rival.optimizer) if rival else ()),
        ],
        "ema": list(ema.average.values()) if ema else [],
    }
    return kept | {"gradients": list(gradients(t for of in kept.values() for t in of))}


def gradients(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """Those of the parameters among `tensors` that have one."""
    return (t.grad for t in tensors if t.is_leaf and t.grad is not None)


def _trained(*modules: nn.Module) -> Iterable[nn.Parameter]:
    return (p for module in modules for p in module.parameters() if p.requires_grad)
