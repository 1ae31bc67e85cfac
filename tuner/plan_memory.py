"""The memory of a plan as text: the phase that peaks, the others, and the ladder of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compiler.plan import Phase, Plan, Rung
from tuner.formats import in_unit_of, size
from tuner.layout import columns, section, wrapped

BESIDE = 1  # rungs shown above and below the chosen one, without -v


def peak(plan: Plan) -> Phase | None:
    """The phase that needs most device memory; None where nothing was simulated."""
    return max(plan.memory.phases, key=lambda phase: phase.device_bytes, default=None)


def memory_lines(plan: Plan, verbose: bool) -> list[str]:
    """The phase that peaks with its parts, the others in a row; with -v all with their parts."""
    top = peak(plan)
    if top is None:
        return section("memory", "not simulated")
    lines = section("memory", peak_words(plan))
    shown = plan.memory.phases if verbose else (top,)
    lines += columns([(p.name, size(p.device_bytes).rjust(9), _parts(p, plan)) for p in shown])
    others = [f"{p.name} {size(p.device_bytes)}" for p in plan.memory.phases if p not in shown]
    if others:
        lines += wrapped(", ".join(others), "  ", "    ")
    host = max(plan.memory.phases, key=lambda phase: phase.host_bytes)
    if host.host_bytes and plan.device != "cpu":
        words = f"host memory: up to {size(host.host_bytes)}, in {host.name}"
        if plan.steps.ranks > 1:
            words += f", for each of {plan.steps.ranks} processes"
        lines += wrapped(words, "  ", "    ")
    return [*lines, *_layout(plan), *_ladder(plan, verbose)]


def peak_words(plan: Plan) -> str:
    """The peak in a line."""
    top = peak(plan)
    assert top is not None, "callers ask only where there are phases"
    budget = plan.memory.budget_bytes
    of = f" of {size(budget)}" if budget else ""
    return f"peak {size(top.device_bytes)}{of} on {plan.device}, in {top.name} (simulated)"


def _parts(phase: Phase, plan: Plan) -> str:
    """What a phase's peak is made of, largest first, in the unit of the whole."""
    parts = sorted(phase.parts.items(), key=lambda item: -item[1])
    whole = phase.device_bytes
    words = ", ".join(f"{name} {in_unit_of(part, whole)}" for name, part in parts if part)
    if phase.host_bytes and plan.device != "cpu":
        words += f"; host {size(phase.host_bytes)}"
    return words


def _layout(plan: Plan) -> list[str]:
    """How the step is laid out, where it is not plain."""
    layout, told = plan.memory.layout, []
    blocks = layout.activation_checkpointing
    if blocks:
        every = "every block" if blocks == 1 else f"every {blocks} blocks"
        told.append(f"recomputes the activations of {every}")
    if layout.fused_backward:
        told.append("updates weights in the backward pass")
    if layout.offload_activations:
        told.append("keeps activations on the host")
    if layout.offload_blocks:
        told.append(f"keeps {layout.offload_blocks} blocks on the host")
    if plan.steps.micro_batch:
        told.append(f"runs batches in parts of {plan.steps.micro_batch}")
    return wrapped(", ".join(told), "  ", "    ") if told else []


def _ladder(plan: Plan, verbose: bool) -> list[str]:
    """The rungs that were looked at; without -v the chosen one and those beside it."""
    rungs = plan.memory.ladder
    if len(rungs) < 2:
        return []
    place = next((n for n, rung in enumerate(rungs) if rung.chosen), 0)
    first = 0 if verbose else max(place - BESIDE, 0)
    last = len(rungs) if verbose else place + BESIDE + 1
    rows = []
    for number in range(first, min(last, len(rungs))):
        rung = rungs[number]
        rows.append(
            (
                ">" if rung.chosen else " ",
                size(rung.peak_bytes).rjust(9),
                f"{rung.relative_time:.2f}x time",
                _rung_words(rung, rungs[:number]),
            )
        )
    head = "  ladder (training and drawing; time of a step is modelled):"
    return [head, *columns(rows, indent=4)]


def _rung_words(rung: Rung, above: Sequence[Rung]) -> str:
    """What the rung adds to the one above it."""
    if not above:
        return "nothing more than the recipe says"
    before: Mapping[str, str] = above[-1].settings
    told = [
        f"{_short(key)} = {value}" for key, value in rung.settings.items() if value != before[key]
    ]
    if rung.alters:
        told.append("alters the result a little")
    return ", ".join(told)


def _short(key: str) -> str:
    return key.removeprefix("memory.").removeprefix("train.").removeprefix("model.")
