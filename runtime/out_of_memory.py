"""What is said, and saved, when a device has too little memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from compiler.memory import gib
from compiler.plan import Plan, Rung
from runtime.errors import OutOfMemory

TORN = "torn"  # attribute of an exception that came in the middle of an update


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised `error`; torch's for the processor has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "DefaultCPUAllocator" in str(error)
    )


def let_go() -> None:
    """Give back what a run that failed had on the device, once no exception holds it any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def updating() -> Iterator[None]:
    """Inside, weights are being changed: what interrupts it leaves them torn."""
    try:
        yield
    except BaseException as error:
        setattr(error, TORN, True)
        raise


def is_torn(error: BaseException) -> bool:
    """Whether `error` came while weights were being changed."""
    return bool(getattr(error, TORN, False))


def refusal(plan: Plan, phase: str, error: BaseException, device: torch.device) -> OutOfMemory:
    """The error for a person: the phase, what was planned, what was there, and the next rung."""
    first = (str(error) or "no memory left").splitlines()[0]
    planned = {p.name: p.device_bytes for p in plan.memory.phases}
    words = f"{device} ran out of memory in phase {phase or 'load'}"
    if phase in planned:
        words += f", for which {gib(planned[phase])} were planned"
    words += _there(device)
    return OutOfMemory(f"{words}: {first}", _advice(plan), phase)


def _there(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    return f"; the device has {gib(total)}, of which others hold {gib(max(total - free - ours, 0))}"


def next_rung(plan: Plan) -> Rung | None:
    """The rung below the chosen one, if the plan looked at it."""
    rungs = plan.memory.ladder
    place = next((number for number, rung in enumerate(rungs) if rung.chosen), len(rungs))
    return rungs[place + 1] if place + 1 < len(rungs) else None


def _advice(plan: Plan) -> str:
    rung = next_rung(plan)
    start = "what was saved before is whole"
    if rung is None:
        return f"{start}; lower the batch size or the resolution"
    chosen = next(r for r in plan.memory.ladder if r.chosen)
    changed = [k for k, value in rung.settings.items() if value != chosen.settings.get(k)]
    options = " ".join(f"--set {key}={rung.settings[key]}" for key in changed)
    return (
        f"{start}; the next rung needs {gib(rung.peak_bytes)}: run it again with {options}, or say "
        'on_oom = "next-rung" in [memory], which does so by itself'
    )
