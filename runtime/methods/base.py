"""What all methods share: the trained weights, their masters, and their state.

Where weights are trained in another number format than the model computes in (float32 masters under
bfloat16 compute), the model holds compute copies and the optimizer owns the masters. A gradient
is handed over, and added up in the master's format, as soon as it is complete; copies are
refreshed before a forward pass that may follow a change of their masters, whoever changed them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from compiler.plan import Adapter
from runtime.batch import Batch

if TYPE_CHECKING:
    from runtime.methods.nested import Nested
    from runtime.offload.blocks import Blocks
    from runtime.text_training import TrainedText

LOSS = "loss"


def is_rivals(step: int) -> bool:
    """Whether, of two that take turns, the update after `step` others is the second one's."""
    return step % 2 == 1


class Method(Protocol):
    """What an update computes, where that is not the loss of one denoising pass."""

    def begin(self, step: int) -> None:
        """Called before the passes of the update after `step` others."""
        ...

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Per sample, (B,) float32 each: "loss" is what is minimised, others are shown."""
        ...


Grow = Callable[[nn.Module], tuple[int, int]]
"""Puts more blocks like its own into a model whose adapter is in place; how many weights without
adapter, and adapted modules, that model has more. For simulations."""


@frozen(kw_only=True)
class Rival:
    """A second network, trained in turns with the first; `buffers` are the rest of its state."""

    trainable: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]


@frozen(kw_only=True)
class Built:
    """A model ready to be trained; `trainable` is what the optimizer updates, by its names."""

    model: nn.Module
    trainable: dict[str, nn.Parameter]
    parameters: int  # of the trained component, without adapter
    adapted_modules: int  # modules that carry an adapter
    method: Method | None = None  # None: the family's own loss
    rival: Rival | None = None
    adapter: Adapter | None = None
    taken: Mapping[str, tuple[Tensor, Tensor]] = field(factory=dict)
    """Module -> (B, A) that its adapter took over from the base, float32 on the host."""
    text: TrainedText | None = None  # encoders that are trained too, under names of their own
    waiting: Blocks | None = None  # blocks that wait on the host
    nested: tuple[Nested, ...] = ()  # what draws the rank of adapters that have another each step

    def copies(self) -> dict[str, nn.Parameter]:
        """Every parameter that computes, trained or not, by its name in training."""
        found = dict(self.model.named_parameters())
        for encoder, module in self.text.encoders.items() if self.text else ():
            found |= {f"{encoder}.{name}": p for name, p in module.named_parameters()}
        return found


def masters(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """What to give the optimizer for the parameters of `model` that require gradients.

    `values` are the weights to start from, in the number format to train in; they become the
    masters. Where the model's own parameters are of that format, they are the masters.
    """
    copies = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if all(copy.dtype == values[name].dtype for name, copy in copies.items()):
        return copies
    pairs = [Pair(copy=copy, master=nn.Parameter(values[name])) for name, copy in copies.items()]
    for pair in pairs:
        pair.copy.register_post_accumulate_grad_hook(pair.hand_over)  # type: ignore[no-untyped-call]
    model.register_forward_pre_hook(_refresh(pairs))
    return {name: pair.master for name, pair in zip(copies, pairs, strict=True)}


@define(kw_only=True, eq=False)
class Pair:
    """A parameter in the number format of the computation, and its master."""

    copy: nn.Parameter
    master: nn.Parameter
    seen: int = -1  # autograd's count of in-place changes of the master, when last copied
    stepping: bool = False  # there is or was a gradient since: fused optimizers change uncounted

    def hand_over(self, copy: Tensor) -> None:
        """Add the finished gradient to the master's."""
        gradient, copy.grad = copy.grad, None
        assert gradient is not None, "called when a gradient is complete"
        self.stepping = True
        if self.master.grad is None:
            self.master.grad = gradient.to(self.master.dtype)
        else:
            self.master.grad.add_(gradient)

    def refresh(self) -> None:
        """Round the master into the copy, unless it can't have changed."""
        if self.stepping or self.master._version != self.seen:
            self.copy.copy_(self.master)
            self.seen = self.master._version
            self.stepping = self.master.grad is not None


def state(built: Built) -> dict[str, Tensor]:
    """The trained weights by name: the tensors themselves, not copies."""
    return {name: parameter.detach() for name, parameter in built.trainable.items()}


@torch.no_grad()
def load_state(built: Built, weights: Mapping[str, Tensor]) -> None:
    """Set the trained weights. Raises ValueError if the names are not those of `state`."""
    check_names(built, weights)
    for name, parameter in built.trainable.items():
        parameter.copy_(weights[name])


def check_names(built: Built, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming one, if `weights` are not named like what is trained."""
    for name in weights.keys() ^ built.trainable.keys():
        there = "is not trained here" if name in weights else "is missing"
        raise ValueError(f"weights of another model or adapter: {name} {there}")


def _refresh(pairs: list[Pair]) -> Callable[..., None]:
    @torch.no_grad()
    def hook(module: nn.Module, inputs: Any) -> None:
        for pair in pairs:
            pair.refresh()

    return hook
