"""The device that a plan runs on: found, and taken by a first tensor on it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compiler.memory import gib
from compiler.plan import Plan
from runtime.errors import MachineUnfit, first_line
from runtime.out_of_memory import is_out_of_memory, there
from runtime.ranks import ALONE, Ranks
from runtime.segments import BY_PAGES, FIXED, setting

BUDGET = "memory.budget"
SHOWS = "`tuner doctor` shows what it finds"


def device_of(plan: Plan, ranks: Ranks = ALONE) -> torch.device:
    """The plan's device, of several CUDA devices the one of this rank, which becomes the current
    one. Raises MachineUnfit if torch can't use it here, or others hold all of its memory."""
    usable: dict[str, Callable[[], bool]] = {
        "cpu": lambda: True,
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
    }
    if not usable[plan.device]():
        raise MachineUnfit(
            f"the plan runs on {plan.device}, which torch {torch.__version__} can't use here",
            help=SHOWS,
        )
    if plan.device == "cuda" and ranks.count > 1:
        count = torch.cuda.device_count()
        if ranks.local >= count:
            raise MachineUnfit(
                f"rank {ranks.rank} is to train on cuda:{ranks.local}, and this machine has "
                f"{count} CUDA device{'s' * (count != 1)}",
                help="set launch.devices to how many there are",
            )
        return _taken(torch.device("cuda", ranks.local))
    return _taken(torch.device(plan.device))


def _taken(device: torch.device) -> torch.device:
    """`device`, which answers; what it says otherwise is turned into errors for a person."""
    try:
        if device.index is not None:
            torch.cuda.set_device(device)
        return claimed(device)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MachineUnfit(
                f"{device} has no memory left{there(device)}: {first_line(error)}",
                help="close what else takes its memory (`nvidia-smi` shows it) and run again: "
                "nothing is lost",
            ) from error
        raise MachineUnfit(
            f"{device} can't be used: {first_line(error)}",
            help=f"`nvidia-smi` shows what else uses it, {SHOWS}",
        ) from error


def check_size(plan: Plan, device: torch.device) -> None:
    """Raises MachineUnfit if `device` is smaller than what the plan needs, which was made to fit
    the free memory of another. A budget that a person has stated stays theirs: it was warned of."""
    source = next((each.source for each in plan.decisions if each.key == BUDGET), "")
    if device.type != "cuda" or source != "this machine":
        return
    needed = max((phase.device_bytes for phase in plan.memory.phases), default=0)
    total = torch.cuda.mem_get_info(device)[1]
    if needed > total:
        raise MachineUnfit(
            f"the plan needs {gib(needed)} and was made for a device with "
            f"{gib(plan.memory.budget_bytes)} free; {device} "
            f"({torch.cuda.get_device_name(device)}) has {gib(total)} in all",
            help="run the recipe here, not a plan of another machine; where several devices "
            "differ, name one in CUDA_VISIBLE_DEVICES",
        )


def claimed(device: torch.device) -> torch.device:
    """`device`, on which a first tensor has been: where its driver can't map memory by pages (some
    virtual devices), the allocator does without."""
    if device.type != "cuda":
        return device
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        if is_out_of_memory(error) or setting() != BY_PAGES:
            raise
        tell_allocator(FIXED)
        torch.empty(1, device=device)
    return device


def tell_allocator(words: str) -> None:
    """Change this process's settings of PyTorch's allocator, by a function that was renamed."""
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (tell or torch.cuda.memory._set_allocator_settings)(words)
