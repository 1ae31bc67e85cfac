"""Frozen blocks whose weights wait in host memory.

A block's weights come to the device right before its forward pass and before its backward pass,
and leave when another offloaded block's turn has come. While one block computes, the next one's
weights are on their way on a stream of their own. So two blocks' weights are on the device at most.

The device memory of a weight that waits is given back by emptying its storage, not by exchanging
the tensor: what autograd has saved of it (a transposed view, in a linear layer) is then filled
again with it. All numbers stay the same, bit for bit: what moves is only copied.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn

from runtime.modules import blocks_of
from runtime.offload.host import host_for, new_stream

_uncounted: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
_resize = torch.ops.inductor.resize_storage_bytes_  # one that the memory tracker sees


def chosen(count: int, offloaded: int) -> list[int]:
    """Which of `count` blocks wait on the host: `offloaded` of them, spread evenly."""
    offloaded = min(offloaded, count)
    apart = spacing(count, offloaded)
    if apart:
        return list(range(apart // 2, count, apart))
    return [(2 * n + 1) * count // (2 * offloaded) for n in range(offloaded)]


def spacing(count: int, offloaded: int) -> int:
    """From each of the `offloaded` blocks that wait to the next one, where that is always equally
    many; 0 where it is not, and where none waits."""
    if not 0 < offloaded <= count:
        return 0
    apart = round(count / offloaded)
    return apart if len(range(apart // 2, count, apart)) == offloaded else 0


def offload_blocks(
    model: nn.Module, lists: Sequence[str], offloaded: int, device: torch.device
) -> Blocks | None:
    """Bring `model` to `device`, but let `offloaded` of the blocks in the module lists `lists` wait
    on the host; None for 0.

    To be called once weights and adapters are in place. What requires gradients does not wait.
    """
    blocks = blocks_of(model, lists)
    numbers = chosen(len(blocks), offloaded) if offloaded else []
    waiting = [_frozen(blocks[number], device) for number in numbers]
    there = {id(weight.tensor) for block in waiting for weight in block}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in there:
            tensor.data = tensor.data.to(device)
    return Blocks([blocks[number] for number in numbers], waiting) if numbers else None


def moves(here: Set[int], number: int, backward: bool, count: int) -> tuple[Set[int], int | None]:
    """Of `count` blocks that wait, of which these are `here`: which ones leave when block `number`
    is needed, and which one is sent for."""
    coming = number - 1 if backward else number + 1
    return here - {number, coming}, coming if 0 <= coming < count else None


def in_backward() -> bool:
    """Whether a backward pass is going on."""
    return bool(torch._C._current_graph_task_id() != -1)


@define(eq=False)
class Waiting:
    """A weight, and its copy on the host."""

    tensor: Tensor
    host: Tensor

    def claim(self) -> None:
        """Take memory on the device."""
        _resize(self.tensor, self.host.nbytes)

    def fill(self) -> None:
        """Copy the weight there."""
        with _uncounted(self.tensor):
            self.tensor.copy_(self.host, non_blocking=True)

    def leave(self) -> None:
        """Give the memory back; frozen weights need not be copied."""
        _resize(self.tensor, 0)


class Blocks:
    """The offloaded blocks of one model, in the order of its forward pass. It has to run on one
    stream, the current one: their memory is given back in that one's order."""

    def __init__(self, blocks: Sequence[nn.Module], weights: Sequence[Sequence[Waiting]]) -> None:
        self._weights = weights
        device = weights[0][0].tensor.device
        self._stream = new_stream(device) if device.type == "cuda" else None
        self._here: set[int] = set()
        self._arriving: dict[int, Any] = {}  # number -> event of the copy
        for number, block in enumerate(blocks):
            self._wrap(number, block)

    @property
    def host_bytes(self) -> int:
        """What waits on the host."""
        return sum(weight.host.nbytes for block in self._weights for weight in block)

    def need(self, number: int) -> None:
        """See to it that block `number` is on the device, and send for the one after it."""
        self._start(number)
        event = self._arriving.pop(number, None)
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        gone, coming = moves(self._here, number, in_backward(), len(self._weights))
        for other in gone:
            self._release(other)
        if coming is not None:
            self._start(coming)

    def settle(self) -> None:
        """As a backward pass leaves them: the first one is here."""
        self._start(0)
        for other in self._here - {0}:
            self._release(other)

    def _start(self, number: int) -> None:
        if number in self._here:
            return
        self._here.add(number)
        for weight in self._weights[number]:
            weight.claim()
        if self._stream is None:
            self._fill(number)
            return
        # The memory may be another tensor's until what is queued has been computed.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._fill(number)
            self._arriving[number] = self._stream.record_event()

    def _fill(self, number: int) -> None:
        for weight in self._weights[number]:
            weight.fill()

    def _release(self, number: int) -> None:
        event = self._arriving.pop(number, None)
        if event is not None:  # sent for in vain: the copy must not write into memory given back
            torch.cuda.current_stream().wait_event(event)
        self._here.discard(number)
        for weight in self._weights[number]:
            weight.leave()

    def _wrap(self, number: int, block: nn.Module) -> None:
        stock = block.forward

        def forward(*arguments: Any, **options: Any) -> Any:
            self.need(number)
            return _before_backward(stock(*arguments, **options), self, number)

        block.forward = forward


def frozen_of(block: nn.Module) -> list[Tensor]:
    """What of `block` can wait: all that is frozen."""
    tensors = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    return [each for each in tensors.values() if not each.requires_grad and _alone(each)]


@torch.no_grad()
def _frozen(block: nn.Module, device: torch.device) -> list[Waiting]:
    """The weights of `block` that wait. They leave the device at once."""
    frozen = frozen_of(block)
    found = []
    for tensor, host in zip(frozen, host_for(frozen, device), strict=True):
        place = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
        )
        host.copy_(tensor)
        tensor.data = place
        waiting = Waiting(tensor, host)
        waiting.leave()
        found.append(waiting)
    return found


def _alone(tensor: Tensor) -> bool:
    """Whether `tensor` is all of its storage."""
    return tensor.nbytes == tensor.untyped_storage().nbytes() > 0


def _before_backward(out: Any, blocks: Blocks, number: int) -> Any:
    """`out`, its tensors marked so that the block is fetched before its backward pass."""
    if isinstance(out, Tensor):
        return _Mark.apply(blocks, number, out) if out.requires_grad else out  # type: ignore[no-untyped-call]
    if isinstance(out, tuple):
        return tuple(_before_backward(each, blocks, number) for each in out)
    return out


class _Mark(torch.autograd.Function):
    """Identity; its backward pass comes before all of the block's."""

    @staticmethod
    def forward(ctx: Any, blocks: Blocks, number: int, tensor: Tensor) -> Tensor:
        ctx.blocks, ctx.number = blocks, number
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.blocks.need(ctx.number)
        return None, None, gradients[0]
