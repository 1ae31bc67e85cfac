"""Memory on the host for what waits there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

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


def host_like(tensor: Tensor) -> Tensor:
    """Host memory for a copy of `tensor` (any content), of its shape and strides.

    Pinned where an accelerator copies from and to it on its own.
    """
    meta, accelerated = tensor.is_meta, tensor.device.type not in ("cpu", "meta")
    with _counting[-1]():
        return torch.empty_strided(
            tensor.size(),
            tensor.stride(),
            dtype=tensor.dtype,
            device="meta" if meta else "cpu",
            pin_memory=accelerated and tensor.device.type == "cuda",
        )


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for copies beside the one that computes."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
