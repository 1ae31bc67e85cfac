"""What the backward pass needs waits in host memory.

Large tensors that autograd saves while the model runs are copied to the host and their memory on
the device is free; in the backward pass each comes back before it is needed, the one before it on
its way already. A tensor saved several times (the input of three projections) is copied once.
Copies have the shape and strides of what they stand for, so the same kernels compute the same bits.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Hashable
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn

from runtime.offload.host import host_like, new_stream

SMALLEST = 2**20  # bytes; smaller tensors cost more to move than they save
AHEAD = 2  # tensors on their way back to the device
BEHIND = 2  # tensors on their way to the host; the next one waits until the first is there


def offload_activations(model: nn.Module) -> None:
    """Let what `model`'s forward pass saves for its backward pass wait on the host."""
    stock = model.forward
    held = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    @functools.wraps(stock)
    def forward(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return stock(*arguments, **options)
        saved = Saved(held)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            return stock(*arguments, **options)

    model.forward = forward


@define(eq=False)
class Parked:
    """One tensor on the host."""

    host: Tensor
    device: torch.device
    number: int  # in the order of saving
    asked: bool = False  # the backward pass has asked for it: it is not sent for once more
    back: weakref.ref[Tensor] | None = None  # on the device again
    event: Any = None  # when the copy to the host, or the one back, is done


class Saved:
    """What one forward pass saved. `held` are storages of weights, which stay where they are."""

    def __init__(self, held: set[int]) -> None:
        self._held = held
        self._order: list[weakref.ref[Parked]] = []
        self._known: dict[Hashable, Parked] = {}
        self._living: dict[int, tuple[Any, list[Hashable]]] = {}  # storage -> keys in `_known`
        self._leaving: deque[tuple[Tensor, Any]] = deque()  # and when each is on the host
        self._coming: dict[int, tuple[Tensor, Any]] = {}  # by number: not asked for yet, as above
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def pack(self, tensor: Tensor) -> Tensor | Parked:
        """In place of a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        if (
            tensor.nbytes < SMALLEST
            or storage._cdata in self._held
            or not _dense(tensor)
            or isinstance(tensor, nn.Parameter)
        ):
            return tensor
        form = (tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype)
        key = (storage._cdata, *form, tensor._version)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._park(tensor)
            self._remember(storage, key)
        return known

    def unpack(self, saved: Tensor | Parked) -> Tensor:
        """The tensor again, on its device."""
        if isinstance(saved, Tensor):
            return saved
        self._known.clear()  # the forward pass is over
        self._leave(0)
        saved.asked = True
        tensor = self._bring(saved)
        self._coming.pop(saved.number, None)
        for number in range(saved.number - 1, max(saved.number - 1 - AHEAD, -1), -1):
            parked = self._order[number]()
            if parked is None or parked.asked:
                continue
            if parked.back is None or parked.back() is None:
                self._coming[number] = self._bring(parked, wait=False), parked.event
        return tensor

    def __del__(self) -> None:
        """A copy that nobody asked for must not write into memory given back."""
        for _, arrived in self._coming.values():
            _wait(arrived)
        self._leave(0)

    def _park(self, tensor: Tensor) -> Parked:
        host = host_like(tensor)
        parked = Parked(host, tensor.device, len(self._order))
        stream = self._stream(tensor.device)
        if stream is None:
            host.copy_(tensor.detach())
        else:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                host.copy_(tensor.detach(), non_blocking=True)
                parked.event = stream.record_event()
        self._order.append(weakref.ref(parked))
        self._leaving.append((tensor.detach(), parked.event))
        self._leave(BEHIND)
        return parked

    def _leave(self, kept: int) -> None:
        """Let go of tensors that are on the host, but for the last `kept`.

        What computes waits for their copies instead of the allocator (`record_stream`), which
        would take more and more memory the further the processor runs ahead of the device.
        """
        while len(self._leaving) > kept:
            _, there = self._leaving.popleft()
            _wait(there)

    def _bring(self, parked: Parked, *, wait: bool = True) -> Tensor:
        tensor = parked.back() if parked.back is not None else None
        if tensor is None:
            tensor = torch.empty_strided(
                parked.host.size(),
                parked.host.stride(),
                dtype=parked.host.dtype,
                device=parked.device,
            )
            self._copy_back(parked, tensor)
            parked.back = weakref.ref(tensor)
        if wait:
            _wait(parked.event)
        return tensor

    def _copy_back(self, parked: Parked, tensor: Tensor) -> None:
        stream = self._stream(parked.device)
        if stream is None:
            tensor.copy_(parked.host)
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            tensor.copy_(parked.host, non_blocking=True)
            parked.event = stream.record_event()

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = new_stream(device)
        return self._streams[device]

    def _remember(self, storage: torch.UntypedStorage, key: Hashable) -> None:
        """Know `key` as long as its storage lives; its address may be another's afterwards."""
        address = storage._cdata
        if address not in self._living:
            self._living[address] = (weakref.ref(storage, lambda _: self._forget(address)), [])
        self._living[address][1].append(key)

    def _forget(self, address: int) -> None:
        for key in self._living.pop(address)[1]:
            self._known.pop(key, None)


def _wait(event: Any) -> None:
    """Let what is computed from now on wait for `event`; None: it has happened."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements lie side by side, each once, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
