"""One step and one batch of held-out pictures more, after training: what they need of memory.

On the processor only, where live tensors are counted. Both are as large as the plan's worst; their
numbers are zeros, which take what others take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from compiler.plan import Plan
from runtime import examples
from runtime.batch import Batch
from runtime.data.feed import Window
from runtime.families.common import inference
from runtime.loop import Trained, one_update
from runtime.memory.buckets import evaluated_shapes, trained_shapes
from runtime.memory.tracker import Tracker
from runtime.resident import gradients, resident
from runtime.step import forward_losses

Parts = Mapping[str, int]
CPU = torch.device("cpu")


def step_parts(plan: Plan, trained: Trained) -> tuple[Parts, Parts]:
    """Bytes by category at the worst moment of the passes of an update, and of what follows them,
    over the largest buckets. Changes the weights, so nothing may follow. Raises RunFailed where
    zeros give a loss that is no number."""
    steps, worst = sides(plan, trained), trained_shapes(plan)
    found = [_update(plan, trained, shape, step) for shape in worst for step in steps]
    passes, updates = zip(*found, strict=True)
    return _most(passes), _most(updates)


def evaluation_parts(plan: Plan, trained: Trained) -> Parts:
    """Bytes by category at the worst moment of the losses of the largest held-out batches."""
    return _most([_evaluation(plan, trained, shape) for shape in evaluated_shapes(plan)])


def trained_whole(plan: Plan) -> int:
    """Updates in which all is trained; text encoders may rest afterwards."""
    ends = [each.until for each in (plan.text_training, plan.embeddings) if each]
    return min([plan.steps.total, *ends])


def sides(plan: Plan, trained: Trained) -> list[int]:
    """For each side that is trained, how many updates are before one of its own: the last one of
    `trained_whole`, and the one beside it where two take turns."""
    last = trained_whole(plan) - 1
    return [last] if trained.rival is None else [last, abs(last - 1)]


def _evaluation(plan: Plan, trained: Trained, shape: tuple[int, int, int]) -> Parts:
    batch = examples.held_out(examples.of_plan(plan), trained.family, shape, CPU)
    words = trained.text
    tracker = _tracker({**resident(plan, trained), "batch": _tensors(batch)})
    unchanged = words.inference() if words else nullcontext()
    with tracker, inference(trained.model), unchanged:
        forward_losses(trained.family, trained.model, batch, plan.objective, plan.precision, words)
    return tracker.breakdown()


def _update(
    plan: Plan, trained: Trained, shape: tuple[int, int, int], step: int
) -> tuple[Parts, Parts]:
    contents = examples.of_plan(plan)
    batches = [
        examples.trained(contents, trained.family, shape, step, CPU)
        for _ in range(plan.steps.accumulate)
    ]
    window = Window(
        step=step,
        epoch=plan.steps.epochs,
        batches=tuple(batches),
        samples=shape[2] * len(batches),
        names=("zeros",) * (shape[2] * len(batches)),
    )
    given = [t for batch in batches for t in _tensors(batch)]
    tracker = _tracker({**resident(plan, trained), "batch": given})
    passes: list[Parts] = []
    encoders = trained.text.encoders.values() if trained.text else ()

    def passed() -> None:
        tracker.register(gradients(trained.turn(step).parameters.values()), "gradients")
        modules = (trained.model, *encoders)
        weights = [t for module in modules for t in module.parameters()]
        tracker.register(gradients(weights), "gradients")
        passes.append(tracker.breakdown())
        tracker.category = "workspace"
        tracker.reset_peak()

    # Compiled steps hide what they make.
    with torch.compiler.set_stance("force_eager"), tracker:
        one_update(plan, trained, window, passed=passed)
        if trained.ema is not None:
            trained.ema.update(trained.ema.facts.every)
    return passes[0], tracker.breakdown()


def _tracker(existing: Mapping[str, Iterable[Tensor]]) -> Tracker:
    tracker = Tracker({"cpu"})
    for category, tensors in existing.items():
        tracker.register(tensors, category)
    tracker.reset_peak()
    return tracker


def _tensors(batch: Batch) -> Sequence[Tensor]:
    tokens = batch.tokens.numbers.values() if batch.tokens else ()
    single = (batch.latents, batch.noise, batch.sigmas, batch.kept, batch.mask)
    found = (*single, *batch.text.values(), *batch.draws.values(), *tokens)
    return [t for t in found if t is not None]


def _most(parts: Sequence[Parts]) -> Parts:
    return max(parts, key=lambda each: sum(each.values()))
