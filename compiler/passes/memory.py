"""Peak device memory, and the activation checkpointing that fits the budget."""

from __future__ import annotations

from attrs import evolve

from compiler import plan
from compiler.draft import Draft
from compiler.memory import Candidate, MemoryModel, Simulation, gib
from compiler.passes.components import model_plan
from compiler.spans import KeyPath
from compiler.units import ByteSize

WHERE: KeyPath = ("memory", "activation_checkpointing")
BUDGET: KeyPath = ("memory", "budget")
RUNGS = (0, 4, 3, 2, 1)  # fewest recomputed blocks first: off, every 4th, 3rd, 2nd, all


def resolve_memory(draft: Draft) -> None:
    """Fill in `draft.memory`, by simulation where a memory model is at hand."""
    if draft.optimizer is None or draft.objective is None or not draft.buckets:
        return
    if any(diagnostic.severity == "error" for diagnostic in draft.diagnostics):
        return  # a recipe that is refused anyway is answered at once
    budget = _budget(draft)
    asked = draft.recipe.memory.activation_checkpointing
    if draft.memory_model is None:
        interval = 0 if asked in ("auto", "off") else int(asked)
        draft.memory = plan.Memory(
            budget_bytes=budget,
            layout=plan.Layout(activation_checkpointing=interval),
            phases=(),
        )
        return
    candidate = _candidate(draft)
    try:
        if asked == "auto":
            interval, found = _fit(draft, draft.memory_model, candidate, budget)
        else:
            interval = 0 if asked == "off" else int(asked)
            found = draft.memory_model.simulate(
                evolve(candidate, layout=plan.Layout(activation_checkpointing=interval))
            )
            draft.decide(WHERE, interval or "off")
    except ValueError as error:
        draft.error("model-refused", _blame(draft), str(error))
        return
    counts = {
        "parameters": found.parameters,
        "trainable": found.trainable,
        "adapted": found.adapted_modules,
        "flops": found.flops,
    }
    draft.memory = plan.Memory(
        budget_bytes=budget,
        layout=plan.Layout(activation_checkpointing=interval),
        phases=found.phases,
        counts=counts,
    )
    _compare(draft, peak(found), budget, interval)


def peak(found: Simulation) -> int:
    """Bytes on the device at the worst moment of the worst phase."""
    return max((phase.device_bytes for phase in found.phases), default=0)


def _budget(draft: Draft) -> int:
    asked = draft.recipe.memory.budget
    if isinstance(asked, ByteSize):
        draft.decide(BUDGET, asked)
        return int(asked)
    if asked == "none":
        draft.decide(BUDGET, "none")
        return 0
    if draft.device != draft.machine.device:
        draft.decide(BUDGET, "none", by="decided", why=f"no {draft.device} device here to ask")
        return 0
    free = draft.machine.device_free_bytes
    draft.decide(BUDGET, gib(free), by="this machine", why="free on the device now")
    return free


def _candidate(draft: Draft) -> Candidate:
    assert draft.precision and draft.text and draft.objective and draft.optimizer and draft.steps
    return Candidate(
        model=model_plan(draft),
        adapter=draft.adapter,
        precision=draft.precision,
        text=draft.text,
        objective=draft.objective,
        optimizer=draft.optimizer,
        max_grad_norm=draft.recipe.train.max_grad_norm,
        ema_on_device=draft.ema is not None
        and (draft.ema.device == "same" or draft.device == "cpu"),
        accumulate=draft.steps.accumulate,
        layout=plan.Layout(),
        shapes=tuple(
            sorted({(b.width, b.height, min(b.batch_size, b.samples)) for b in draft.buckets})
        ),
        device=draft.device,
    )


def _fit(
    draft: Draft, model: MemoryModel, candidate: Candidate, budget: int
) -> tuple[int, Simulation]:
    """The first rung that fits; the last one if none does."""
    found = None
    for interval in RUNGS:
        found = model.simulate(
            evolve(candidate, layout=plan.Layout(activation_checkpointing=interval))
        )
        if not budget or peak(found) <= budget:
            why = (
                "fits without recomputing anything"
                if interval == 0
                else f"the fewest recomputed blocks that fit {gib(budget)}"
            )
            if not budget:
                why = "no budget to fit"
            draft.decide(WHERE, interval or "off", by="decided", why=why)
            return interval, found
    assert found is not None
    draft.decide(WHERE, 1, by="decided", why="the least memory there is; it still does not fit")
    return 1, found


def _compare(draft: Draft, needed: int, budget: int, interval: int) -> None:
    if not budget or needed <= budget:
        return
    draft.error(
        "does-not-fit",
        _blame(draft),
        f"needs {gib(needed)} of device memory, {gib(needed - budget)} "
        f"more than the budget of {gib(budget)}",
        help=_smaller(draft, interval),
    )


def _smaller(draft: Draft, interval: int) -> str:
    ways = []
    if interval == 0:
        ways.append("activation_checkpointing = 1")
    if draft.recipe.train.batch_size > 1:
        ways.append("a smaller batch_size with accumulate")
    if draft.adapter is not None and draft.adapter.rank > 16:
        ways.append("a lower rank")
    ways.append("a smaller resolution")
    return "what would lower it: " + ", ".join(ways)


def _blame(draft: Draft) -> KeyPath:
    for path in (BUDGET, ("train", "batch_size"), ("model", "base")):
        if draft.given(path):
            return path
    return ("model",)
