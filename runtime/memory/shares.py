"""What each block has of a model's sums, and where its passes begin."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from runtime.memory.curve import NotAlike
from runtime.memory.tracker import Tracker
from runtime.methods.base import Built
from runtime.new_tokens import is_rows
from runtime.offload.blocks import frozen_of, in_backward
from runtime.quantise.layers import num_weights
from runtime.text_training import owner

Form = tuple[str, tuple[int, ...], torch.dtype]
"""A trained parameter: name, shape, type."""


def forms_of(trainable: Mapping[str, nn.Parameter]) -> list[Form]:
    """Of what the optimizer updates."""
    return [(name, tuple(p.shape), p.dtype) for name, p in trainable.items()]


def kind_of(form: Form) -> tuple[str, bool, tuple[int, ...], torch.dtype]:
    """Whose it is (a text encoder's, or "" of all else), whether it is new tokens', its shape and
    its type."""
    name, shape, dtype = form
    whose = owner(name)
    return whose if whose.startswith("text_encoder") else "", is_rows(name), shape, dtype


Weights = Sequence[tuple[str, int]]
"""Of one block: category and bytes of each."""


@frozen(kw_only=True)
class Share:
    """What one block has of a model's sums."""

    held: Mapping[str, int]  # bytes on the device of weights and adapter, by category
    parameters: int  # without adapter
    adapted_modules: int
    numbers: int  # parameters, adapter included
    buffer_bytes: int
    forms: Sequence[Form]  # of what the optimizer updates


def shares_of(
    built: Built, blocks: Sequence[nn.Module], numbers: Collection[int], tracker: Tracker
) -> dict[int, Share]:
    """The shares of the blocks with these numbers, nothing of the step having been run. Raises
    NotAlike if the model's numbers are not such sums."""
    whole = parameters_in(built.model, adapted=built.adapter is not None)
    if whole != built.parameters or (
        built.text is None and adapted_in(built.model) != built.adapted_modules
    ):
        raise NotAlike("what belongs to the adapter is not known")
    wanted = {id(blocks[number]): number for number in numbers}
    found = {}
    for name, module in built.model.named_modules():
        if id(module) in wanted:
            own = {n: p for n, p in built.trainable.items() if n.startswith(f"{name}.")}
            found[wanted[id(module)]] = _share(built, module, own, tracker)
    return found


def parameters_in(module: nn.Module, *, adapted: bool) -> int:
    """Weights without adapter; `adapted`: that is all that is trained."""
    fresh = sum(p.numel() for p in module.parameters() if p.requires_grad) if adapted else 0
    return num_weights(module) - fresh


def adapted_in(module: nn.Module) -> int:
    """Modules that carry an adapter."""
    return sum(isinstance(part, BaseTunerLayer) for part in module.modules())


def _share(
    built: Built, block: nn.Module, trained: Mapping[str, nn.Parameter], tracker: Tracker
) -> Share:
    parameters, buffers = list(block.parameters()), list(block.buffers())
    return Share(
        held=tracker.held([*parameters, *buffers, *trained.values()]),
        parameters=parameters_in(block, adapted=built.adapter is not None),
        adapted_modules=adapted_in(block),
        numbers=sum(p.numel() for p in parameters),
        buffer_bytes=sum(buffer.nbytes for buffer in buffers),
        forms=forms_of(trained),
    )


def weights_of(block: nn.Module, tracker: Tracker) -> Weights:
    """What of a block can wait on the host."""
    return [one for tensor in frozen_of(block) for one in tracker.held([tensor]).items()]


def mark_blocks(
    blocks: Sequence[nn.Module], tracker: Tracker, flops: Callable[[], int]
) -> list[RemovableHandle]:
    """Tell `tracker` when the passes of each block begin: the forward one when it is called, the
    backward one when the gradient of its last result is complete."""
    found = []
    for number, block in enumerate(blocks):
        begin, end = _hooks(number, tracker, flops)
        found += [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
    return found


def _hooks(
    number: int, tracker: Tracker, flops: Callable[[], int]
) -> tuple[Callable[..., None], Callable[..., None]]:
    def begin(*_: object) -> None:
        if not in_backward():  # what records no gradients is not counted, see `run_step`
            tracker.step(number, False, flops() if torch.is_grad_enabled() else 0)

    def end(module: nn.Module, given: Any, result: Any) -> None:
        if in_backward() or not torch.is_grad_enabled():
            return
        results = result if isinstance(result, tuple) else (result,)
        asked = [each for each in results if isinstance(each, Tensor) and each.requires_grad]
        if asked:
            asked[-1].register_hook(back)  # type: ignore[no-untyped-call]

    def back(_: Tensor) -> None:
        tracker.step(number, True, flops())

    return begin, end
