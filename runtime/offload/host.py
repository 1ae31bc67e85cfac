"""Memory on the host for what waits there.

Pinned where an accelerator copies from and to it on its own. PyTorch rounds pinned memory up to a
power of two (ATen/core/CachingHostAllocator.h), which is asked for here everywhere, so that plans
count what is taken; weights, which stay, share pieces of such sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from attrs import define
from torch import Tensor

from runtime.errors import first_line
from runtime.out_of_memory import is_out_of_memory

ALIGNMENT = 512  # bytes; as on the device

_counting: list[Callable[[], AbstractContextManager[None]]] = [nullcontext]


@contextmanager
def counted(elsewhere: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, host memory is taken inside of `elsewhere()`: a tracker of device memory, under which
    meta tensors stand for both, leaves out what is made there."""
    _counting.append(elsewhere)
    try:
        yield
    finally:
        _counting.pop()


@define
class Given:
    """What `host_like` gave: bytes that were asked for, and bytes that were taken for them."""

    asked: int = 0
    taken: int = 0

    @property
    def share(self) -> float:
        """Of what was taken, what is used."""
        return self.asked / self.taken if self.taken else 1.0


_given: list[Given] = []


@contextmanager
def giving() -> Iterator[Given]:
    """Counts what is given inside."""
    _given.append(Given())
    try:
        yield _given[-1]
    finally:
        _given.pop()


def host_like(tensor: Tensor) -> Tensor:
    """Host memory for a copy of the dense `tensor` (any content), of its shape and strides."""
    for given in _given[-1:]:
        given.asked += tensor.nbytes
        given.taken += _power(tensor.nbytes)
    return _as(tensor, _piece(tensor.nbytes, tensor.device), 0)


def host_for(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """As `host_like` for each of the dense `tensors`, which are to go to `device` and back, and
    all stay equally long."""
    places, sizes = packed([tensor.nbytes for tensor in tensors])
    pieces = [_piece(size, device) for size in sizes]
    return [
        _as(tensor, pieces[piece], start)
        for tensor, (piece, start) in zip(tensors, places, strict=True)
    ]


def packed(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Where things of `sizes` bytes lie, as (piece, first byte), and the pieces' sizes, powers of
    two: the largest things first, each piece no larger than what is left, or little larger."""
    places = [(0, 0)] * len(sizes)
    pieces: list[int] = []
    left = sorted(range(len(sizes)), key=lambda n: -sizes[n])
    while left:
        total = sum(_aligned(sizes[n]) for n in left)
        piece = _power(total)
        if piece > total + total // 8:
            piece = max(piece // 2, _power(sizes[left[0]]))
        taken, rest = 0, []
        for n in left:
            if taken + sizes[n] <= piece:
                places[n] = (len(pieces), taken)
                taken += _aligned(sizes[n])
            else:
                rest.append(n)
        pieces.append(piece)
        left = rest
    return places, pieces


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _power(nbytes: int) -> int:
    """The next power of two."""
    return 1 << max(nbytes - 1, 0).bit_length()


def _piece(nbytes: int, device: torch.device) -> Tensor:
    """So many bytes, or more, on the host of `device`. Raises MemoryError."""
    with _counting[-1](), pinning() if device.type == "cuda" else nullcontext():
        return torch.empty(
            _power(nbytes),
            dtype=torch.uint8,
            device="meta" if device.type == "meta" else "cpu",
            pin_memory=device.type == "cuda",
        )


@contextmanager
def pinning() -> Iterator[None]:
    """Inside, memory is pinned. Where there is none, CUDA says what it says of a device that is
    full: it is the host's, and MemoryError is raised."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"no memory could be pinned: {first_line(error)}") from error


def _as(tensor: Tensor, piece: Tensor, start: int) -> Tensor:
    flat = piece[start : start + tensor.nbytes].view(tensor.dtype)
    return torch.as_strided(flat, tensor.size(), tensor.stride())


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for copies beside the one that computes."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
