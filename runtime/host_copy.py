"""A copy of a run's state in host memory, made fast: training waits for nothing else of a save."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from runtime.memory.pieces import tensors_in

ALIGNED = 64  # bytes; where each tensor's copy begins


class HostCopy:
    """Room for one copy at a time, kept from one copy to the next.

    Fresh memory costs more than the copying: the system clears each page when it is first
    touched. On CUDA the room is page-locked, so that the device writes to it directly and all
    tensors are on their way at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._room: mmap.mmap | None = None
        self._locked = 0  # its address, if it is page-locked

    def take(self, tree: Any) -> Any:
        """`tree` (nested dicts, lists, tuples) with copies in place of its tensors. They stand in
        the room: the next call overwrites them."""
        ends = list(accumulate(_aligned(tensor.nbytes) for tensor in _movable(tree)))
        room = self._of(ends[-1]) if ends else None
        starts = iter([0, *ends])
        copied = _mapped(tree, lambda tensor: _copy(tensor, room, next(starts)))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return copied

    def _of(self, size: int) -> mmap.mmap:
        """Room for at least `size` bytes."""
        if self._room is None or len(self._room) < size:
            self.close()
            self._room = mmap.mmap(-1, size)
            if self._device.type == "cuda":
                self._lock(self._room)
        return self._room

    def _lock(self, room: mmap.mmap) -> None:
        """Page-lock `room`. Where the system refuses (a limit of such memory), copies are slower
        and as good."""
        address = torch.frombuffer(room, dtype=torch.uint8).data_ptr()
        code = torch.cuda.cudart().cudaHostRegister(address, len(room), 0)  # type: ignore[no-untyped-call]
        self._locked = address if int(code) == 0 else 0
        if not self._locked:
            with suppress(RuntimeError):  # the error stays with CUDA until somebody asks for it
                torch.zeros(1, device=self._device)

    def close(self) -> None:
        """Let go of the room; copies that are still held stay as they are."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._locked)  # type: ignore[no-untyped-call]
        self._room, self._locked = None, 0


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _is_movable(tensor: Tensor) -> bool:
    """Whether its bytes lie in one piece. Others (low-bit states that wrap several tensors) are
    cloned by their own rules."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_contiguous()
        and tensor.numel() > 0
    )


def _movable(tree: Any) -> Iterator[Tensor]:
    return filter(_is_movable, tensors_in(tree))


def _mapped(tree: Any, copy: Any) -> Any:
    if isinstance(tree, Tensor):
        return copy(tree) if _is_movable(tree) else tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _mapped(value, copy) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, copy) for value in tree)
    return tree


@torch.no_grad()
def _copy(tensor: Tensor, room: mmap.mmap | None, start: int) -> Tensor:
    """A copy at byte `start` of the room, with a storage of its own (savers write whole ones)."""
    assert room is not None
    flat = torch.frombuffer(room, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    made = flat.view(tensor.shape)
    made.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    return made
