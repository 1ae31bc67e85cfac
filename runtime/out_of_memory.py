"""What is said, and saved, when a device has too little memory."""

from __future__ import annotations

import errno
import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from compiler.memory import gib
from compiler.plan import Plan
from runtime.errors import OutOfMemory, first_line
from runtime.less_memory import advice
from runtime.saved import latest, step_of

TORN = "torn"  # attribute of an exception that came in the middle of an update
SAYS = (
    "out of memory",  # allocators, the CUDA runtime and driver, NCCL, Triton
    "defaultcpuallocator",
    "alloc_failed",  # CUBLAS_STATUS_, CUDNN_STATUS_, CUSOLVER_STATUS_; CUFFT_
    "allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_, ..._HOST_
)
"""What libraries say whose exceptions have no type of their own, in small letters."""
OF_HOST = ("defaultcpuallocator", "host_allocation_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there was no memory left, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in SAYS)


def _of_host(error: BaseException) -> bool:
    """Whether it was surely the host's."""
    text = str(error).lower()
    return isinstance(error, MemoryError | OSError) or any(words in text for words in OF_HOST)


def let_go(error: BaseException | None = None) -> None:
    """Give back what a run that failed had on the device, and pinned for it on the host, once no
    exception holds it any more, or but for `error`, whose frames are cleared. A device that answers
    nothing more keeps it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # Pinned memory is given back once the copies from and to it are known to be done.
        for give_back in (torch.cuda.synchronize, torch.cuda.empty_cache, _empty_host_cache):
            with suppress(RuntimeError):
                give_back()


def _empty_host_cache() -> None:
    """Give back pinned memory that no tensor has, by a function that was renamed."""
    older = getattr(torch._C, "_host_emptyCache", None)
    if empty := getattr(torch.accelerator, "empty_host_cache", older):
        empty()


@contextmanager
def updating() -> Iterator[None]:
    """Inside, weights or their average are being changed: what interrupts it leaves them torn."""
    try:
        yield
    except BaseException as error:
        setattr(error, TORN, True)
        raise


def is_torn(error: BaseException) -> bool:
    """Whether `error` came while weights or their average were being changed."""
    return bool(getattr(error, TORN, False))


def refusal(plan: Plan, phase: str, error: BaseException, device: torch.device) -> OutOfMemory:
    """The error for a person: the phase, what was planned, what was there, and what to do."""
    planned = {p.name: p.device_bytes for p in plan.memory.phases}
    on_host = device.type != "cpu" and _of_host(error)
    doing = f"in phase {phase or 'load'}"
    if phase in planned and not on_host:
        doing += f", for which {gib(planned[phase])} were planned"
    told = advice(plan, phase, on_host=on_host)
    help = f"{_kept(plan, torn=is_torn(error))}; {told}"
    return shortage(doing, error, device, help, phase)


def shortage(
    doing: str, error: BaseException, device: torch.device, help: str, phase: str
) -> OutOfMemory:
    """The error for a person: what was being done, what was there, and `help`."""
    on_host = device.type != "cpu" and _of_host(error)
    words = f"the host ran out of memory {doing}"
    if not on_host:
        words = f"{device} ran out of memory {doing}{there(device)}"
    return OutOfMemory(f"{words}: {first_line(error)}", help, phase, on_host=on_host)


def there(device: torch.device) -> str:
    """What a CUDA device has, and who has it, after a semicolon; "" where it does not tell."""
    if device.type != "cuda":
        return ""
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # after some errors a process can ask its device nothing more
        return ""
    ours = torch.cuda.memory_reserved(device)
    return f"; the device has {gib(total)}, of which others hold {gib(max(total - free - ours, 0))}"


def _kept(plan: Plan, *, torn: bool) -> str:
    """What there is to go on from."""
    if plan.steps.ranks > 1:  # rank 0 may be about to save
        return "what was saved before is whole"
    saved = latest(Path(plan.run_folder) / "checkpoints")
    words = f"the run goes on from step {step_of(saved)}" if saved else "the run begins anew"
    if torn:
        words += ", for weights were being changed when it came, and those are not saved"
    return words
