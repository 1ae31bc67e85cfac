"""What a run measured, to be set beside what was planned: `measured.json`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from compiler.plan import Plan
from runtime.batch import masked
from runtime.clock import Clock
from runtime.data.feed import Window
from runtime.loop import Trained, one_update
from runtime.machine import look, versions
from runtime.memory.measure import measure
from runtime.memory.simulate import CUBLAS_WORKSPACE, CUDA_CONTEXT
from runtime.memory.step import worst
from runtime.methods.sprint import Distillation
from runtime.methods.sprint_draws import example
from runtime.optimizers import state_tensors
from runtime.text_training import example_tokens


def measured(plan: Plan, trained: Trained, clock: Clock, device: torch.device) -> dict[str, Any]:
    """The content of `measured.json`. Trains one step more, so nothing may follow.

    Memory is the device allocator's peak of each phase (CUDA); on the processor, which has no such
    thing, the peak of live tensors in one training step at the largest bucket.
    """
    peaks = dict(clock.peak_bytes)
    if device.type == "cpu" and trained.shards is None:  # one more step is all ranks' to make
        peaks["train"] = step_peak(plan, trained, device)
    planned = planned_peaks(plan)
    return {
        "plan": plan.digest,
        "steps": plan.steps.total,
        "device": "cpu" if device.type == "cpu" else look().device_name,
        "versions": versions(),
        "seconds": {name: round(value, 3) for name, value in clock.seconds.items()},
        "memory": {
            name: {
                "planned_bytes": sum(planned[name].values()) if name in planned else None,
                "planned_parts": planned.get(name, {}),
                "measured_bytes": peaks.get(name),
            }
            for name in sorted(planned.keys() | peaks.keys())
        },
    }


def planned_peaks(plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes by category of each phase that is measured, without what no allocator tells of.

    A step is measured as a whole: what is planned for it is its passes or its update, whichever
    needs more. The device's context lies outside of its allocator's figures.
    """
    found = {phase.name: dict(phase.parts) for phase in plan.memory.phases}
    update = found.pop("update", {})
    if sum(update.values()) > sum(found.get("train", {}).values()):
        found["train"] = update
    for parts in found.values():
        outside = parts.pop("context", 0)
        if outside > CUDA_CONTEXT:
            parts["workspace of cuBLAS"] = CUBLAS_WORKSPACE
    return found


def step_peak(plan: Plan, trained: Trained, device: torch.device) -> int:
    """Bytes of live tensors at the worst moment of one update, over the largest buckets."""
    shapes = [(b.width, b.height, b.batch_size) for b in plan.buckets]
    ends = [each.until for each in (plan.text_training, plan.embeddings) if each]
    last = min([plan.steps.total, *ends]) - 1  # while all is trained
    steps = [last] if trained.rival is None else [last, abs(last - 1)]  # one of each side
    return max(
        _update_peak(plan, trained, device, shape, step)
        for shape in worst(shapes)
        for step in steps
    )


def _update_peak(
    plan: Plan, trained: Trained, device: torch.device, shape: tuple[int, int, int], step: int
) -> int:
    width, height, batch_size = shape
    batches = tuple(
        trained.family.example_batch(plan.model, width, height, batch_size, plan.text, device)
        for _ in range(plan.steps.accumulate)
    )
    if any(source.mask for source in plan.sources):
        batches = tuple(masked(batch) for batch in batches)
    if any(source.target == "base" for source in plan.sources):
        batches = tuple(evolve(batch, keeps_base=True) for batch in batches)
    if trained.text is not None:
        tokens = example_tokens(plan.model, tuple(trained.text.encoders), batch_size, device)
        batches = tuple(evolve(batch, tokens=tokens) for batch in batches)
    if plan.sprint is not None:
        batches = tuple(example(plan.sprint, batch, step) for batch in batches)
    window = Window(
        step=step,
        epoch=plan.steps.epochs,
        batches=batches,
        samples=batch_size * len(batches),
        names=(),
    )
    held = {
        "batch": [
            t
            for b in batches
            for t in (
                b.latents,
                b.noise,
                b.sigmas,
                b.kept,
                *b.text.values(),
                b.mask,
                *b.draws.values(),
                *(b.tokens.numbers.values() if b.tokens else ()),
            )
            if t is not None
        ],
        **_resident(trained),
    }
    with torch.compiler.set_stance("force_eager"):  # compiled steps hide what they make
        return measure(lambda mark: one_update(plan, trained, window), device, held).peak


def _resident(trained: Trained) -> dict[str, Iterable[Tensor]]:
    """What is there before a step, as the plan names it."""
    method, rival = trained.method, trained.rival
    others = method.others if isinstance(method, Distillation) else []
    encoders = trained.text.encoders.values() if trained.text else ()
    return {
        "weights": [
            each
            for model in (trained.model, *others, *encoders)
            for each in (*model.parameters(), *model.buffers())
        ],
        "adapter": list(trained.parameters.values()),
        "optimizer": [
            *state_tensors(trained.optimizer),
            *(state_tensors(rival.optimizer) if rival else ()),
        ],
    }
