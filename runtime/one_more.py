"""One step and one batch of held-out pictures more, after training: what they need of memory.

On the processor only, where live tensors are counted. Both are as large as the plan's worst; their
numbers are zeros, which take what others take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from attrs import evolve
from torch import Tensor

from compiler.plan import Plan
from runtime.batch import Batch, masked
from runtime.data.feed import Window
from runtime.families.common import inference
from runtime.loop import Trained, one_update
from runtime.memory.buckets import worst_in
from runtime.memory.tracker import Tracker
from runtime.methods.sprint_draws import example
from runtime.resident import gradients, resident
from runtime.step import forward_losses
from runtime.text_training import example_tokens

Parts = Mapping[str, int]
CPU = torch.device("cpu")


def step_parts(plan: Plan, trained: Trained) -> tuple[Parts, Parts]:
    """Bytes by category at the worst moment of the passes of an update, and of what follows them,
    over the largest buckets. Changes the weights, so nothing may follow. Raises RunFailed where
    zeros give a loss that is no number."""
    ends = [each.until for each in (plan.text_training, plan.embeddings) if each]
    last = min([plan.steps.total, *ends]) - 1  # while all is trained
    steps = [last] if trained.rival is None else [last, abs(last - 1)]  # one of each side
    shapes = [(b.width, b.height, min(b.batch_size, b.samples)) for b in plan.buckets]
    worst = worst_in(plan, shapes)
    found = [_update(plan, trained, shape, step) for shape in worst for step in steps]
    passes, updates = zip(*found, strict=True)
    return _most(passes), _most(updates)


def evaluation_parts(plan: Plan, trained: Trained) -> Parts:
    """Bytes by category at the worst moment of the losses of the largest held-out batches."""
    assert plan.evaluation is not None
    groups = plan.evaluation.groups
    shapes = [(g.width, g.height, min(g.batch_size, g.images)) for g in groups]
    worst = worst_in(plan, shapes, evaluated=True)
    return _most([_evaluation(plan, trained, shape) for shape in worst])


def _evaluation(plan: Plan, trained: Trained, shape: tuple[int, int, int]) -> Parts:
    batch, words = _batch(plan, trained, shape), trained.text
    tracker = _tracker({**resident(plan, trained), "batch": _tensors(batch)})
    unchanged = words.inference() if words else nullcontext()
    with tracker, inference(trained.model), unchanged:
        forward_losses(trained.family, trained.model, batch, plan.objective, plan.precision, words)
    return tracker.breakdown()


def _update(
    plan: Plan, trained: Trained, shape: tuple[int, int, int], step: int
) -> tuple[Parts, Parts]:
    batches = [_batch(plan, trained, shape) for _ in range(plan.steps.accumulate)]
    if any(source.target == "base" for source in plan.sources):
        batches = [evolve(batch, keeps_base=True) for batch in batches]
    if plan.sprint is not None:
        batches = [example(plan.sprint, batch, step) for batch in batches]
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


def _batch(plan: Plan, trained: Trained, shape: tuple[int, int, int]) -> Batch:
    batch = trained.family.example_batch(plan.model, *shape, plan.text, CPU)
    if any(source.mask for source in plan.sources):
        batch = masked(batch)
    if trained.text is not None:
        tokens = example_tokens(plan.model, tuple(trained.text.encoders), shape[2], CPU)
        batch = evolve(batch, tokens=tokens)
    return batch


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
